"""`InlineExecutor`: the `Executor` port with the one rank in this process, on a thread of its own.

For the command line, tests and a single device. Torch is imported by `start`, so that importing this is cheap.
Everything the rank does happens on one thread, in the order of the calls; on a GPU a second one waits for results,
so that the next step is launched while the last one computes.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from engine.batch import Batch, StepOutput
from engine.config import DeviceKind, EngineConfig
from engine.errors import ConfigError, EngineDeadError
from engine.executor import CacheCapacity
from engine.rank_thread import RankThread

if TYPE_CHECKING:
    from engine.pending_step import PendingStep
    from engine.worker import Worker

Measured = TypeVar("Measured")


class InlineExecutor:
    """Runs a group of one. `progress(bytes_done, bytes_total)` is told about the loading of the weights, `tell` what
    else takes long, or does not work as it was meant to. `emulates_fp8`: see `Worker`.
    """

    def __init__(
        self,
        config: EngineConfig,
        progress: Callable[[int, int], None] | None = None,
        tell: Callable[[str], None] | None = None,
        *,
        emulates_fp8: bool = False,
    ) -> None:
        if config.tensor_parallel != 1:
            raise ConfigError(
                f"An InlineExecutor has one rank, but tensor_parallel is {config.tensor_parallel}: use a worker group."
            )
        self._config = config
        self._progress = progress
        self._tell = tell
        self._emulates_fp8 = emulates_fp8
        self._worker: Worker | None = None
        self._failure: EngineDeadError | None = None
        self._close_lock = threading.Lock()
        self._is_closed = False
        self._launches = RankThread("nanoserve-rank-0")
        self._results = RankThread("nanoserve-rank-0-results") if config.device is DeviceKind.CUDA else None

    def start(self) -> CacheCapacity:
        """Load the model; blocks. Raises `ConfigError` for what cannot start."""
        return self._launches.call(self._start)

    def execute(self, batch: Batch) -> asyncio.Future[StepOutput]:
        """Queue one step from the running event loop; the result raises `EngineDeadError` when it fails."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[StepOutput] = loop.create_future()
        if self._failure is not None:
            answer.set_exception(self._failure)
        else:
            self._launches.post(lambda: self._launch(batch, _Answer(loop, answer)))
        return answer

    def measure(self, function: Callable[[EngineConfig], Measured]) -> Measured:
        """The function of the rank's configuration, called on its thread between steps.

        Measurements belong there: OpenMP keeps a team of threads for every thread that computes, and where two teams do
        not fit on the cores, GNU's lets both sleep at barriers instead of spinning (docs/cpu_kernels.md).
        """
        return self._launches.call(lambda: function(self._config if self._worker is None else self._worker.config))

    def ask(self, function: "Callable[[Worker], Measured]") -> Measured:
        """The function of the rank itself, called on its thread between steps. Raises `EngineDeadError` before `start`
        and after `close`.
        """

        def asked() -> Measured:
            if self._worker is None:
                raise EngineDeadError("The executor was not started, or it was closed.")
            return function(self._worker)

        return self._launches.call(asked)

    def close(self) -> None:
        """Stop the rank after the step already begun; those still queued fail. Idempotent."""
        with self._close_lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._failure = self._failure or EngineDeadError("The executor was closed.")
            try:
                self._launches.call(self._stop)
            finally:
                self._launches.close()
                if self._results is not None:
                    self._results.close()

    def _start(self) -> CacheCapacity:
        from engine.worker import Worker

        self._worker = Worker(self._config, emulates_fp8=self._emulates_fp8)
        return self._worker.start(self._progress, self._tell)

    def _launch(self, batch: Batch, answer: "_Answer") -> None:
        try:
            if self._failure is not None:
                raise self._failure
            if self._worker is None:
                raise EngineDeadError("The executor was not started.")
            pending = self._worker.execute(batch)
        except Exception as error:
            answer.fail(self._fail(batch, error))
            return
        if self._results is None:  # a launched step is over: nobody need wait for it
            self._wait(batch, pending, answer)
        else:
            self._results.post(lambda: self._wait(batch, pending, answer))

    def _wait(self, batch: Batch, pending: "PendingStep", answer: "_Answer") -> None:
        try:
            output = pending.wait()
        except Exception as error:
            answer.fail(self._fail(batch, error))
        else:
            answer.give(output)

    def _fail(self, batch: Batch, error: Exception) -> EngineDeadError:
        """No step runs after a failed one: what it would compute from a half-written cache is worthless."""
        if isinstance(error, EngineDeadError):
            return error
        self._failure = EngineDeadError(f"Rank 0 failed in step {batch.step}: {type(error).__name__}: {error}")
        self._failure.__cause__ = error
        return self._failure

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


class _Answer:
    """A step's result on its way to the event loop that waits for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[StepOutput]) -> None:
        self._loop = loop
        self._future = future

    def give(self, output: StepOutput) -> None:
        self._tell(self._future.set_result, output)

    def fail(self, error: EngineDeadError) -> None:
        self._tell(self._future.set_exception, error)

    def _tell(self, settle: Callable[[Any], None], value: object) -> None:
        def settle_if_awaited() -> None:
            if not self._future.done():
                settle(value)

        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it everybody who waited
            self._loop.call_soon_threadsafe(settle_if_awaited)
