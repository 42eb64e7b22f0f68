"""`RankGroup`: an `Executor` over stand-in ranks in processes of their own, on the sockets that real ranks use.

A rank is `cluster.rank`'s loop around a `StandInRunner` and a `StandInDevice`. The engine's side is that of
`cluster.worker_group` without Ray: nobody watches for a rank that dies.
"""

import asyncio
import multiprocessing
import os
import socket
import tempfile
import time
from collections import deque
from pathlib import Path

from step_parts.runner import StandInRunner
from step_parts.setting import Setting
from step_parts.stand_in_device import StandInDevice, StepBoard

from cluster.rank import LaunchedStep, RankSteps
from cluster.step_transport import Hello, RankLink, RankSocket, Stop, encode
from engine import Batch, CacheCapacity, StepOutput

_START_SECONDS = 60.0


class RankGroup:
    """`setting.num_ranks` processes; `use` and `capacity` before each engine, `stop` at the end."""

    def __init__(self, setting: Setting) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="step-ranks-")
        path = Path(self._directory.name)
        self.board = StepBoard(path / "board", setting.num_ranks, create=True)
        self.capacity = setting.capacity
        self.send_seconds: list[float] = []
        self._waiting: deque[asyncio.Future[StepOutput]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._links: dict[int, RankLink] = {}
        context = multiprocessing.get_context("spawn")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path / "engine"))
            listener.listen()
            listener.settimeout(_START_SECONDS)
            self._processes = [
                context.Process(target=_serve, args=(setting, rank, path), daemon=True)
                for rank in range(setting.num_ranks)
            ]
            for process in self._processes:
                process.start()
            links = [RankLink(listener.accept()[0]) for _ in self._processes]
        for link in links:
            self._links[_greeting(link).rank] = link

    def start(self) -> CacheCapacity:
        """The ranks run already."""
        self.board.clear()
        self.send_seconds.clear()
        return self.capacity

    def execute(self, batch: Batch) -> asyncio.Future[StepOutput]:
        """Send one step to every rank; the future is rank 0's answer."""
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            loop.add_reader(self._links[0].fileno(), self._on_readable)
        future: asyncio.Future[StepOutput] = loop.create_future()
        self._waiting.append(future)
        frame = encode(batch)
        for link in self._links.values():
            link.send(frame, loop)
        self.send_seconds.append(time.perf_counter() - started)
        return future

    def close(self) -> None:
        """The engine is over; the ranks are there for the next one."""

    async def settle(self) -> None:
        """Wait until the ranks have answered every step, also those whose engine is over."""
        while self._waiting:
            await asyncio.sleep(0.001)

    def stop(self) -> None:
        """End the processes."""
        for link in self._links.values():
            link.stop(encode(Stop()))
        for process in self._processes:
            process.join()
        for link in self._links.values():
            link.close()
        self._directory.cleanup()

    def _on_readable(self) -> None:
        for output in self._links[0].receive():
            assert isinstance(output, StepOutput)
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(output)


def _greeting(link: RankLink) -> Hello:
    while not (reports := link.receive()):
        time.sleep(0.001)
    assert isinstance(reports[0], Hello)
    return reports[0]


def _serve(setting: Setting, rank: int, directory: Path) -> None:
    """A rank's process."""
    board = StepBoard(directory / "board", setting.num_ranks)
    runner = StandInRunner(setting.config)
    engine = RankSocket(str(directory / "engine"))
    engine.send(Hello(rank, os.getpid()))
    _Rank(board, runner, engine, rank).run()


class _Rank:
    def __init__(self, board: StepBoard, runner: StandInRunner, engine: RankSocket, rank: int) -> None:
        self._board = board
        self._runner = runner
        self._engine = engine
        self._device = StandInDevice(board, rank)
        self._rank = rank

    def run(self) -> None:
        RankSteps(self._engine, self._rank).run(self._execute, launches_ahead=True)

    def _execute(self, batch: Batch) -> LaunchedStep:
        if self._board.step_seconds < 0:
            return _Echo(batch)
        step = self._device.launch(batch.step, self._runner.launch(batch))
        return step if self._board.launches_ahead else _Computed(step.wait())


class _Echo:
    recorded = None

    def __init__(self, batch: Batch) -> None:
        self._output = StepOutput(step=batch.step, token_ids=batch.sampled)

    def wait(self) -> StepOutput:
        return self._output


class _Computed(_Echo):
    def __init__(self, output: StepOutput) -> None:
        self._output = output
