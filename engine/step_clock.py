"""`StepClock`: how long the device worked on one step."""

import time

import torch


class StepClock:
    """Measures one step: on a GPU the time between two events of the stream, on a CPU that of the wall clock.

    It runs from its making. On a GPU it is to be started anew once the host has prepared what the device does first:
    until then the device waits for the host, or has the step before to do. So what passes on the device between the
    stop of one step and the start of the next is nobody's computing, and no step has the time of another.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._started = time.perf_counter()
        self._seconds = 0.0
        if device.type == "cuda":
            self._events = _timing_event(), _timing_event()
            self.start()

    def start(self) -> None:
        """The step's first work is about to be launched. On a CPU it has begun: the host is what computes."""
        if self._events is not None:
            self._events[0].record()

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
