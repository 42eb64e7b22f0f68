"""`PowerLog`: clocks and power while something is measured, read by NVML; nothing where pynvml is not installed."""

import contextlib
import statistics
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_SECONDS = 0.05


class PowerLog:
    """`problem` says why there are no readings, where there are none."""

    def __init__(self, device_index: int = 0, library: ModuleType | Any | None = None) -> None:
        self.problem: str | None = None
        self._handle: Any = None
        try:
            if library is None:
                import pynvml  # type: ignore[import-not-found]

                library = pynvml
            library.nvmlInit()
            self._handle = library.nvmlDeviceGetHandleByIndex(device_index)
        except Exception as error:  # no package, no driver, no permission: measuring goes on without
            self.problem = f"no clocks and power: {type(error).__name__}: {error}"
        self._library: Any = library

    @contextlib.contextmanager
    def sampled(self) -> Iterator[dict[str, float]]:
        """A dictionary that afterwards holds the medians of what was read inside: `watts`, `sm_mhz`, `memory_mhz`."""
        medians: dict[str, float] = {}
        if self._handle is None:
            yield medians
            return
        readings: list[tuple[float, float, float]] = []
        is_over = threading.Event()
        thread = threading.Thread(target=self._sample, args=(readings, is_over), daemon=True)
        thread.start()
        try:
            yield medians
        finally:
            is_over.set()
            thread.join()
            for name, values in zip(("watts", "sm_mhz", "memory_mhz"), zip(*readings, strict=True), strict=False):
                medians[name] = statistics.median(values)

    def _sample(self, readings: list[tuple[float, float, float]], is_over: threading.Event) -> None:
        library, handle = self._library, self._handle
        with contextlib.suppress(Exception):  # a reading that the driver refuses ends the log, not the measurement
            while True:
                readings.append(
                    (
                        library.nvmlDeviceGetPowerUsage(handle) / 1e3,
                        float(library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM)),
                        float(library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_MEM)),
                    )
                )
                if is_over.wait(_SECONDS):
                    return


def described(medians: dict[str, float]) -> str:
    """For a row's note."""
    return f"{medians['watts']:.0f} W, {medians['sm_mhz']:.0f} MHz" if medians else ""
