"""One rank as a Ray actor: connects to its engine's socket, starts a `Worker`, runs the steps it is sent.

Brings torch into its process, and only inside `run`. On a GPU a second thread
waits for results, so that the next step is launched while the last one computes; on a CPU a launched step is done.
"""

import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from cluster.rank_meter import RankMeter
from cluster.step_transport import Doing, Failed, Hello, Progress, RankSocket, Stop
from engine import Batch, DeviceKind, EngineConfig, EngineDeadError, NanoserveError, RecordedStep, StepOutput

# Ranks of a group share a node: their rendezvous and collectives stay off every other interface.
LOOPBACK_ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
COMPUTING_NICENESS = 10
_PROGRESS_STEPS = 200  # reports per loading, at most


class LaunchedStep(Protocol):
    """What `engine.pending_step.PendingStep` is to this module."""

    @property
    def recorded(self) -> RecordedStep | None:
        """What ran when, where the batch asked for it."""
        ...

    def wait(self) -> StepOutput:
        """The step's tokens, as soon as they are there."""
        ...


class Rank:
    """The actor class. `run` is its one long call; it returns after `Stop`, or after a failure it has reported."""

    def run(
        self,
        config: EngineConfig,
        rank: int,
        socket_path: str,
        rendezvous: str | None,
        log: Callable[[int], None] = lambda rank: None,
    ) -> None:
        """Serve steps until told to stop. Raises only where the engine cannot be told: it never could be reached."""
        log(rank)
        os.environ.update(LOOPBACK_ENVIRONMENT)
        if config.device is DeviceKind.CPU:
            _yield_to_servants()
        engine = RankSocket(socket_path)
        engine.send(Hello(rank, os.getpid()))
        steps = RankSteps(engine, rank, RankMeter.create(Path(socket_path).parent, rank))
        try:
            from engine.worker import Worker

            worker = Worker(config, rank, rendezvous)
            capacity = worker.start(_progress_to(engine), lambda text: engine.send(Doing(text)))
            if (memory := worker.memory()) is not None:
                engine.send(memory)
            engine.send(capacity)
            steps.run(worker.execute, launches_ahead=config.device is DeviceKind.CUDA)
            worker.close()
        except OSError:
            return  # the engine is gone, and with it everybody who could be told
        except Exception as error:
            engine.send(Failed(_explain(rank, steps.last, error)))


class RankSteps:
    """The steps of one rank, from its socket and back to it. `last` is the number of the one begun last."""

    def __init__(self, engine: RankSocket, rank: int, meter: RankMeter | None = None) -> None:
        self._engine = engine
        self._rank = rank
        self._meter = meter
        self.last: int | None = None

    def run(self, execute: Callable[[Batch], LaunchedStep], *, launches_ahead: bool) -> None:
        """Until told to stop. With `launches_ahead` a step is launched while the one before it is still computed."""
        completion = _Completion(self._engine, self._rank, self._meter) if launches_ahead else None
        while not isinstance(command := self._engine.receive(), Stop):
            self.last = command.step
            launched = execute(command)
            if completion is not None:
                completion.add(command.step, launched)
            else:
                _finish(self._engine, self._rank, launched, self._meter)
        if completion is not None:
            completion.close()


class _Completion:
    """Waits for launched steps in order, on a thread of its own."""

    def __init__(self, engine: RankSocket, rank: int, meter: RankMeter | None) -> None:
        self._engine = engine
        self._rank = rank
        self._meter = meter
        self._pending: queue.SimpleQueue[tuple[int, LaunchedStep] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="step results", daemon=True)
        self._thread.start()

    def add(self, step: int, pending: LaunchedStep) -> None:
        self._pending.put((step, pending))

    def close(self) -> None:
        self._pending.put(None)
        self._thread.join()

    def _run(self) -> None:
        step: int | None = None
        try:
            while (item := self._pending.get()) is not None:
                step = item[0]
                _finish(self._engine, self._rank, item[1], self._meter)
        except OSError:
            return
        except Exception as error:
            self._engine.send(Failed(_explain(self._rank, step, error)))


def _finish(engine: RankSocket, rank: int, pending: LaunchedStep, meter: RankMeter | None) -> None:
    """Every rank draws the same tokens; rank 0 tells the engine. A recorded step every rank tells, as it saw it."""
    output = pending.wait()
    if meter is not None:
        meter.finished(output)
    if pending.recorded is not None:
        engine.send(pending.recorded)
    if rank == 0:
        engine.send(output)


def _yield_to_servants() -> None:
    """Lower this thread, and those it will start: the model takes all it is given, others need little but soon.

    So a step of 256 streams is written in half the time (`docs/http_overhead.md`).
    """
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    if niceness < COMPUTING_NICENESS:
        os.setpriority(os.PRIO_PROCESS, 0, COMPUTING_NICENESS)


def _progress_to(engine: RankSocket) -> Callable[[int, int], None]:
    last = -1

    def report(done: int, total: int) -> None:
        nonlocal last
        part = done * _PROGRESS_STEPS // max(total, 1)
        if part != last:
            last = part
            engine.send(Progress(done, total))

    return report


def _explain(rank: int, step: int | None, error: Exception) -> NanoserveError:
    if isinstance(error, NanoserveError) and step is None:
        return error
    when = "while starting" if step is None else f"in step {step}"
    return EngineDeadError(f"Rank {rank} failed {when}: {type(error).__name__}: {error}")
