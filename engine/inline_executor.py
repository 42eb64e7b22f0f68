"""`InlineExecutor`: the `Executor` port with the one rank in this process, on a thread of its own.

For the command line, tests and a single device. Torch is imported by `start`, so that importing this is cheap.
Everything the rank does happens on one thread, in the order of the calls; on a GPU a second one waits for results,
so that the next step is launched while the last one computes.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from engine.batch import Batch, StepOutput
from engine.config import DeviceKind, EngineConfig
from engine.errors import ConfigError, EngineDeadError
from engine.executor import CacheCapacity

if TYPE_CHECKING:
    from engine.pending_step import PendingStep
    from engine.worker import Worker

Measured = TypeVar("Measured")


class InlineExecutor:
    """Runs a group of one. `progress(bytes_done, bytes_total)` is told about the loading of the weights."""

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        if config.tensor_parallel != 1:
            raise ConfigError(
                f"An InlineExecutor has one rank, but tensor_parallel is {config.tensor_parallel}: use a worker group."
            )
        self._config = config
        self._progress = progress
        self._worker: Worker | None = None
        self._failure: EngineDeadError | None = None
        self._close_lock = threading.Lock()
        self._is_closed = False
        self._launches = ThreadPoolExecutor(1, thread_name_prefix="nanoserve-rank-0")
        self._results = ThreadPoolExecutor(1, thread_name_prefix="nanoserve-rank-0-results")

    def start(self) -> CacheCapacity:
        """Load the model; blocks. Raises `ConfigError` for what cannot start."""
        return self._launches.submit(self._start).result()

    def execute(self, batch: Batch) -> Awaitable[StepOutput]:
        """Queue one step from the running event loop; the result raises `EngineDeadError` when it fails."""
        if self._failure is not None:
            failed: asyncio.Future[StepOutput] = asyncio.get_running_loop().create_future()
            failed.set_exception(self._failure)
            return failed
        if self._config.device is DeviceKind.CPU:  # a launched step is over: nobody need wait for it
            return asyncio.wrap_future(self._launches.submit(self._run, batch))
        launched = self._launches.submit(self._launch, batch)
        return asyncio.wrap_future(self._results.submit(lambda: self._wait(batch, launched.result())))

    def measure(self, function: Callable[[EngineConfig], Measured]) -> Measured:
        """The function of the configuration, called on the rank's thread between steps.

        Measurements belong there: OpenMP keeps a team of threads for every thread that computes, and where two teams do
        not fit on the cores, GNU's lets both sleep at barriers instead of spinning (docs/cpu_kernels.md).
        """
        return self._launches.submit(function, self._config).result()

    def close(self) -> None:
        """Stop the rank after the step already begun; those still queued fail. Idempotent."""
        with self._close_lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._failure = self._failure or EngineDeadError("The executor was closed.")
            try:
                self._launches.submit(self._stop).result()
            finally:
                self._launches.shutdown()
                self._results.shutdown()

    def _start(self) -> CacheCapacity:
        from engine.worker import Worker

        self._worker = Worker(self._config)
        return self._worker.start(self._progress)

    def _launch(self, batch: Batch) -> "PendingStep":
        if self._failure is not None:
            raise self._failure
        if self._worker is None:
            raise EngineDeadError("The executor was not started.")
        try:
            return self._worker.execute(batch)
        except Exception as error:
            raise self._fail(batch, error) from error

    def _run(self, batch: Batch) -> StepOutput:
        return self._wait(batch, self._launch(batch))

    def _wait(self, batch: Batch, pending: "PendingStep") -> StepOutput:
        try:
            return pending.wait()
        except Exception as error:
            raise self._fail(batch, error) from error

    def _fail(self, batch: Batch, error: Exception) -> EngineDeadError:
        """No step runs after a failed one: what it would compute from a half-written cache is worthless."""
        self._failure = EngineDeadError(f"Rank 0 failed in step {batch.step}: {type(error).__name__}: {error}")
        return self._failure

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
