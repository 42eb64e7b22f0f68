"""`StepClock`: how long the device worked on one step."""

import time

import torch


class StepClock:
    """Measures the device time of one step: between two events of the stream, or on the CPU by the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = _timing_event(), _timing_event()
            self._events[0].record()
        self._started = time.perf_counter()
        self._seconds = 0.0

    def stop(self) -> None:
        """The step's last work has been launched."""
        if self._events is not None:
            self._events[1].record()
        self._seconds = time.perf_counter() - self._started

    def seconds(self) -> float:
        """The time between start and stop; on a GPU it waits for the stop."""
        if self._events is None:
            return self._seconds
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1e3


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
