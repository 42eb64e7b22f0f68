"""`StandInDevice`: a device that computes nothing and takes its time, one for all ranks of a group.

A step starts when every rank has launched it and the step before it has ended, as collectives would make it, and takes
a fixed time of a clock that all processes share. Waiting is sleeping, so that the processors are free for host work.
Starts and ends are computed, not observed: a sleep that ends late delays nothing but the message that says so, and a
rank that computes in its own thread is told how late it woke, to be taken out of the figures.
"""

import mmap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from engine import StepOutput
from engine.pending_step import PendingStep
from engine.recorded_step import RecordedStep

NUM_STEPS: Final = 1 << 13  # of one engine, at most
_POLL_SECONDS: Final = 1e-4


class StepBoard:
    """What the processes of a group tell each other, in a file that all of them map: times of one clock, by step."""

    def __init__(self, path: Path, num_ranks: int, *, create: bool = False) -> None:
        shape = (1 + 2 * num_ranks, NUM_STEPS)
        if create:
            path.write_bytes(bytes(8 * shape[0] * shape[1]))
        with path.open("r+b") as file:
            table = np.frombuffer(mmap.mmap(file.fileno(), 0), np.float64).reshape(shape)
        self._settings = table[0]
        self.launched = table[1 : 1 + num_ranks]
        self.lateness = table[1 + num_ranks :]

    @property
    def step_seconds(self) -> float:
        """What the device takes for a step; negative where ranks answer without having prepared anything."""
        return float(self._settings[0])

    @property
    def launches_ahead(self) -> bool:
        """Whether ranks take the next step while the device is at one, or compute in the thread that takes steps."""
        return bool(self._settings[1])

    def set(self, *, step_seconds: float, launches_ahead: bool) -> None:
        """From the next step on."""
        self._settings[:2] = step_seconds, launches_ahead

    def clear(self) -> None:
        """Before another engine counts steps from 0."""
        self.launched[:] = 0
        self.lateness[:] = 0


@dataclass(slots=True)
class StandInDevice:
    """One rank's view of the device; all ranks compute the same times."""

    board: StepBoard
    rank: int
    free_at: float = 0.0

    def launch(self, step: int, pending: PendingStep) -> "StepOnDevice":
        """The rank has prepared a step."""
        seconds = max(0.0, self.board.step_seconds)
        self.board.launched[self.rank, step] = time.monotonic()
        return StepOnDevice(self, step, pending, seconds)


@dataclass(frozen=True, slots=True)
class StepOnDevice:
    """A launched step; `cluster.rank` waits for it."""

    device: StandInDevice
    step: int
    pending: PendingStep
    seconds: float

    @property
    def recorded(self) -> RecordedStep | None:
        """What ran when, where the batch asked for it."""
        return self.pending.recorded

    def wait(self) -> StepOutput:
        """Sleep until the device is done with it."""
        while (end := self._end()) is None:
            time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        while now < end:
            time.sleep(end - now)
            now = time.monotonic()
        self.device.free_at = end
        self.device.board.lateness[self.device.rank, self.step] = now - end
        return self.pending.wait()

    def _end(self) -> float | None:
        launched = self.device.board.launched[:, self.step]
        if not launched.all():
            return None
        return max(self.device.free_at, float(launched.max())) + self.seconds
