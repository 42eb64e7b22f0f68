"""`PowerLog`: clocks and power while something is measured, read by NVML; nothing where pynvml is not installed."""

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

_SECONDS = 0.05
_LOG_SECONDS = 0.5
_Reading = tuple[float, float, float]


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
        readings: list[_Reading] = []
        try:
            with self._reading(_SECONDS, lambda at, reading: readings.append(reading)):
                yield medians
        finally:
            for name, column in zip(("watts", "sm_mhz", "memory_mhz"), zip(*readings, strict=True), strict=False):
                medians[name] = statistics.median(column)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[dict[str, float]]]:
        """A list that grows while this lasts: twice a second `seconds` since its start, and what was read then."""
        entries: list[dict[str, float]] = []
        started = time.monotonic()

        def note(at: float, reading: _Reading) -> None:
            watts, sm_mhz, memory_mhz = reading
            entries.append(
                {"seconds": round(at - started, 2), "watts": watts, "sm_mhz": sm_mhz, "memory_mhz": memory_mhz}
            )

        with self._reading(_LOG_SECONDS, note):
            yield entries

    @contextlib.contextmanager
    def _reading(self, every: float, take: Callable[[float, _Reading], None]) -> Iterator[None]:
        """Give `take` moments and readings, by a thread of its own: one at least."""
        if self._handle is None:
            yield
            return
        is_over = threading.Event()
        thread = threading.Thread(target=self._sample, args=(take, every, is_over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _sample(self, take: Callable[[float, _Reading], None], every: float, is_over: threading.Event) -> None:
        library, handle = self._library, self._handle
        with contextlib.suppress(Exception):  # a reading that the driver refuses ends the log, not the measurement
            while True:
                reading = (
                    library.nvmlDeviceGetPowerUsage(handle) / 1e3,
                    float(library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM)),
                    float(library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_MEM)),
                )
                take(time.monotonic(), reading)
                if is_over.wait(every):
                    return


def summary(entries: list[dict[str, float]]) -> str:
    """Of a record, for a row's note: medians, and between which clocks the multiprocessors ran."""
    if not entries:
        return ""
    clocks = [entry["sm_mhz"] for entry in entries]
    watts = statistics.median(entry["watts"] for entry in entries)
    return f"{watts:.0f} W, {statistics.median(clocks):.0f} MHz ({min(clocks):.0f} to {max(clocks):.0f})"


def described(medians: dict[str, float]) -> str:
    """For a row's note."""
    return f"{medians['watts']:.0f} W, {medians['sm_mhz']:.0f} MHz" if medians else ""
