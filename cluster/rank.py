"""One rank as a Ray actor: connects to its engine's socket, starts a `Worker`, runs the steps it is sent.

Brings torch into its process, and only inside `run`. On a GPU a second thread
waits for results, so that the next step is launched while the last one computes; on a CPU a launched step is done.
"""

import os
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.step_transport import Failed, Hello, Progress, RankSocket, Stop
from engine import DeviceKind, EngineConfig, EngineDeadError, NanoserveError

if TYPE_CHECKING:
    from engine.pending_step import PendingStep

# Ranks of a group share a node: their rendezvous and collectives stay off every other interface.
LOOPBACK_ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
_PROGRESS_STEPS = 200  # reports per loading, at most


class Rank:
    """The actor class. `run` is its one long call; it returns after `Stop`, or after a failure it has reported."""

    def run(self, config: EngineConfig, rank: int, socket_path: str, rendezvous: str | None) -> None:
        """Serve steps until told to stop. Raises only where the engine cannot be told: it never could be reached."""
        os.environ.update(LOOPBACK_ENVIRONMENT)
        engine = RankSocket(socket_path)
        engine.send(Hello(rank, os.getpid()))
        step: int | None = None
        try:
            from engine.worker import Worker

            worker = Worker(config, rank, rendezvous)
            engine.send(worker.start(_progress_to(engine)))
            completion = _Completion(engine, rank) if config.device is DeviceKind.CUDA else None
            while not isinstance(command := engine.receive(), Stop):
                step = command.step
                pending = worker.execute(command)
                if completion is not None:
                    completion.add(step, pending)
                else:
                    _finish(engine, rank, pending)
            if completion is not None:
                completion.close()
            worker.close()
        except OSError:
            return  # the engine is gone, and with it everybody who could be told
        except Exception as error:
            engine.send(Failed(_explain(rank, step, error)))


class _Completion:
    """Waits for launched steps in order, on a thread of its own."""

    def __init__(self, engine: RankSocket, rank: int) -> None:
        self._engine = engine
        self._rank = rank
        self._pending: queue.SimpleQueue[tuple[int, PendingStep] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="step results", daemon=True)
        self._thread.start()

    def add(self, step: int, pending: "PendingStep") -> None:
        self._pending.put((step, pending))

    def close(self) -> None:
        self._pending.put(None)
        self._thread.join()

    def _run(self) -> None:
        step: int | None = None
        try:
            while (item := self._pending.get()) is not None:
                step = item[0]
                _finish(self._engine, self._rank, item[1])
        except OSError:
            return
        except Exception as error:
            self._engine.send(Failed(_explain(self._rank, step, error)))


def _finish(engine: RankSocket, rank: int, pending: "PendingStep") -> None:
    """Every rank draws the same tokens; rank 0 tells the engine."""
    output = pending.wait()
    if rank == 0:
        engine.send(output)


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
