"""`WorkerGroup`: the `Executor` port over the rank actors of one replica.

Ranks are spawned into the replica's own placement group; their lives are watched through Ray, the steps travel over
`cluster.step_transport`. The first sign of a failing rank ends the group: every waiting step raises an
`EngineDeadError` that names the rank and the cause, once that is known or `DIAGNOSIS_SECONDS` have passed. Imports no
torch: that is the ranks' business.
"""

import asyncio
import contextlib
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.rank import Rank
from cluster.rank_folder import RankFolder
from cluster.rank_meter import RankMeter
from cluster.step_recorder import StepRecorder
from cluster.step_transport import Doing, Failed, Hello, Progress, RankLink, Report, Stop, encode
from engine import (
    Batch,
    CacheCapacity,
    EngineConfig,
    EngineDeadError,
    MemoryUse,
    NanoserveError,
    RecordedStep,
    StepOutput,
)

DIAGNOSIS_SECONDS = 2.0  # Ray tells why a process died a moment after its socket closed
CLOSE_SECONDS = 5.0
_POLL_SECONDS = 0.2
_ECHO = "Another rank of the group"  # so begin errors of ranks that only hear of another's; see `engine.worker`


class WorkerGroup:
    """The ranks of one tensor-parallel group. `rank_options` are Ray's actor options, one set per rank.

    While it starts, `progress` is told of the weights, and `tell` in words of what else takes long. Each rank's process
    begins by calling `log` with the rank's number: that sets up its log. Once started,
    `memory` has what each rank's process holds, and `meters` what it has done; `recorder` can have a step recorded.
    """

    def __init__(
        self,
        config: EngineConfig,
        rank_options: Sequence[dict[str, Any]],
        progress: Callable[[int, int], None] | None = None,
        tell: Callable[[str], None] = lambda text: None,
        log: Callable[[int], None] = lambda rank: None,
    ) -> None:
        assert len(rank_options) == config.tensor_parallel
        self._config = config
        self._rank_options = rank_options
        self._progress = progress
        self._tell = tell
        self._log = log
        self._folder: RankFolder | None = None
        self._actors: list[Any] = []
        self._runs: list[Any] = []
        self._connections: list[RankLink] = []
        self._links: dict[int, RankLink] = {}
        self._waiting: deque[asyncio.Future[StepOutput]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._collapse: asyncio.Task[None] | None = None
        self.recorder = StepRecorder(len(rank_options))
        self.pids: dict[int, int] = {}
        self.memory: list[MemoryUse] = []
        self.meters: list[RankMeter] = []
        self.death: EngineDeadError | None = None

    def start(self) -> CacheCapacity:
        """Spawn the ranks and wait until every one has loaded; blocks. Raises `ConfigError` or `EngineDeadError`."""
        try:
            self._folder = RankFolder()
            return self._start(self._folder.path)
        except OSError as error:
            self.close()
            raise EngineDeadError(f"The ranks could not be started: {error}") from error
        except BaseException:
            self.close()
            raise

    def _start(self, directory: Path) -> CacheCapacity:
        path = str(directory / "engine")
        rendezvous = f"file://{directory / 'rendezvous'}" if self._config.tensor_parallel > 1 else None
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            listener.setblocking(False)
            for rank, options in enumerate(self._rank_options):
                actor: Any = ray.remote(Rank).options(**options).remote()
                self._actors.append(actor)
                self._runs.append(actor.run.remote(self._config, rank, path, rendezvous, self._log))
            start = _Start(listener, self._runs, self._progress, self._tell)
            capacity = start.wait(self._connections, self._links, self.pids)
        self.meters = [RankMeter.open(directory, rank) for rank in range(len(self._rank_options))]
        self.memory = sorted(start.memory, key=lambda use: use.process)
        return capacity

    def execute(self, batch: Batch) -> asyncio.Future[StepOutput]:
        """Send one step to every rank; the future is rank 0's answer."""
        loop = asyncio.get_running_loop()
        self.watch()
        future: asyncio.Future[StepOutput] = loop.create_future()
        if self.death is not None:
            future.set_exception(self.death)
            return future
        self._waiting.append(future)
        frame = encode(replace(batch, is_recorded=True) if self.recorder.begins(batch.step) else batch)
        for link in self._links.values():
            link.send(frame, loop)
        return future

    def close(self) -> None:
        """Let the ranks end, then make sure of it; blocks for at most a few seconds. Idempotent."""
        if self._folder is None:
            return
        folder, self._folder = self._folder, None
        is_healthy = self.death is None and len(self._links) == len(self._runs)
        self.death = self.death or EngineDeadError("The worker group was closed.")
        frame = encode(Stop())
        for link in self._links.values():
            link.stop(frame)
        with contextlib.suppress(RayError):  # ranks of a broken group wait for each other: no use waiting for them
            ray.wait(self._runs, num_returns=len(self._runs), timeout=CLOSE_SECONDS if is_healthy else 0)
        for actor in self._actors:
            ray.kill(actor)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._forget_connections)
        else:
            self._forget_connections()
        folder.remove()

    def watch(self) -> None:
        """Notice from now on, on the running loop, when a rank ends, with or without steps. Idempotent."""
        if self._loop is not None:
            return
        self._loop = loop = asyncio.get_running_loop()
        for rank, link in self._links.items():
            loop.add_reader(link.fileno(), self._on_readable, rank)

    def _on_readable(self, rank: int) -> None:
        assert self._loop is not None
        if self.death is not None or self._collapse is not None:
            self._loop.remove_reader(self._links[rank].fileno())  # whatever it says comes too late
            return
        try:
            for report in self._links[rank].receive():
                self._take(rank, report)
        except OSError:
            self._begin_collapse(rank, None)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            self._begin_collapse(rank, EngineDeadError(f"Rank {rank} sent what nobody can use: {what}"))

    def _take(self, rank: int, report: Report) -> None:
        if isinstance(report, StepOutput):
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(report)
        elif isinstance(report, RecordedStep):
            self.recorder.take(report)
        elif isinstance(report, Failed):
            self._begin_collapse(rank, report.error)

    def _begin_collapse(self, rank: int, error: NanoserveError | None) -> None:
        assert self._loop is not None
        self._loop.remove_reader(self._links[rank].fileno())
        if self._collapse is None and self.death is None:
            self._collapse = self._loop.create_task(self._collapse_from(rank, error))

    async def _collapse_from(self, rank: int, error: NanoserveError | None) -> None:
        """Fail everything, naming a dead rank before those that merely failed because of it."""
        runs = {asyncio.ensure_future(asyncio.wrap_future(run.future())): rank for rank, run in enumerate(self._runs)}
        patience = DIAGNOSIS_SECONDS if error is None else DIAGNOSIS_SECONDS / 4
        await asyncio.wait(runs, timeout=patience, return_when=asyncio.FIRST_EXCEPTION)
        for run, of_rank in runs.items():
            if run.done() and not run.cancelled() and (cause := run.exception()) is not None:
                error = EngineDeadError(f"Rank {of_rank} died: {_first_lines(cause)}")
                break
        for run in runs:
            run.cancel()
        if not isinstance(error, EngineDeadError):
            error = EngineDeadError(str(error) if error else f"Rank {rank} closed its connection without a word.")
        self.death = error
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)

    def _forget_connections(self) -> None:
        for link in self._connections:
            link.close(self._loop)


class _Start:
    """The wait for ranks to connect, load and be ready."""

    def __init__(
        self,
        listener: socket.socket,
        runs: Sequence[Any],
        progress: Callable[[int, int], None] | None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._listener = listener
        self._runs = runs
        self._progress = progress
        self._tell = tell
        self._loaded: dict[int, Progress] = {}
        self.memory: list[MemoryUse] = []
        self._capacities: list[CacheCapacity] = []

    def wait(self, connections: list[RankLink], links: dict[int, RankLink], pids: dict[int, int]) -> CacheCapacity:
        """Fill `connections`, and `links` and `pids` by rank; returns what every rank agreed on."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while len(self._capacities) < len(self._runs):
                events = selector.select(_POLL_SECONDS)
                for key, _ in events:
                    if key.fileobj is self._listener:
                        connections.append(RankLink(self._listener.accept()[0]))
                        selector.register(connections[-1], selectors.EVENT_READ)
                    else:
                        assert isinstance(key.fileobj, RankLink)
                        self._read(key.fileobj, links, pids)
                if not events:
                    self._check_lives()
        assert len(set(self._capacities)) == 1, self._capacities
        return self._capacities[0]

    def _read(self, link: RankLink, links: dict[int, RankLink], pids: dict[int, int]) -> None:
        try:
            reports = link.receive()
        except OSError:
            deadline = time.monotonic() + DIAGNOSIS_SECONDS
            while time.monotonic() < deadline:
                self._check_lives()
                time.sleep(_POLL_SECONDS)
            raise EngineDeadError("A rank closed its connection while starting.") from None
        for report in reports:
            self._handle(report, link, links, pids)

    def _handle(self, report: Report, link: RankLink, links: dict[int, RankLink], pids: dict[int, int]) -> None:
        match report:
            case Hello(rank=rank, pid=pid):
                links[rank] = link
                pids[rank] = pid
            case Progress():
                rank = next(rank for rank, known in links.items() if known is link)
                self._loaded[rank] = report
                if self._progress is not None:
                    done = sum(loaded.done for loaded in self._loaded.values())
                    self._progress(done, sum(loaded.total for loaded in self._loaded.values()))
            case Doing(text=text):
                self._tell(text)
            case MemoryUse():
                self.memory.append(report)
            case CacheCapacity():
                self._capacities.append(report)
            case Failed(error=error):
                raise self._find_cause(error, links)
            case StepOutput() | RecordedStep():
                raise AssertionError("a rank answered a step that nobody sent")

    def _find_cause(self, first: NanoserveError, links: dict[int, RankLink]) -> NanoserveError:
        """The error of a start that `first` tells of: ranks wait for each other, so one that fails fails others."""
        errors = [first]
        deadline = time.monotonic() + DIAGNOSIS_SECONDS / 4
        while len(errors) < len(self._runs) and time.monotonic() < deadline:
            self._check_lives()
            for link in links.values():
                with contextlib.suppress(OSError):
                    errors += [report.error for report in link.receive() if isinstance(report, Failed)]
            time.sleep(_POLL_SECONDS / 4)
        return min(errors, key=lambda error: (str(error).startswith(_ECHO), isinstance(error, EngineDeadError)))

    def _check_lives(self) -> None:
        done, _ = ray.wait(list(self._runs), num_returns=len(self._runs), timeout=0)
        for run in done:
            rank = self._runs.index(run)
            try:
                ray.get(run)
            except RayError as error:
                raise EngineDeadError(f"Rank {rank} died while starting: {_first_lines(error)}") from error


def _first_lines(error: BaseException) -> str:
    """What Ray says first, without its advice and identifiers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = [line for line in lines if not line.startswith(("class_name:", "actor_id:", "pid:", "namespace:", "ip:"))]
    return " ".join(wanted[:3]) or type(error).__name__
