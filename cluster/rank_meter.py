"""`RankMeter`: what one rank has done so far, in a page of memory that it shares with its replica.

A rank writes after each step, a fraction of a microsecond; the replica reads when Prometheus asks. So nothing travels
per step, and a rank that hangs can still be read: the one whose count stays behind the others' is where to look.
"""

import mmap
from dataclasses import dataclass
from pathlib import Path

from engine import StepOutput

_FIELDS = 4  # steps, timed steps, device seconds, exposed network seconds: aligned doubles, each written at once
_BYTES = 8 * _FIELDS


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReading:
    """Counters of one rank since its start; `exposed_network_seconds` are of the `num_timed_steps` alone."""

    num_steps: int
    num_timed_steps: int
    device_seconds: float
    exposed_network_seconds: float


class RankMeter:
    """One rank's counters, in a file of the group's directory that outlives its name."""

    def __init__(self, rank: int, path: Path) -> None:
        self.rank = rank
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), _BYTES)
        self._values = memoryview(self._page).cast("d")

    @classmethod
    def create(cls, directory: Path, rank: int) -> "RankMeter":
        """The writer's, at zero."""
        path = _path(directory, rank)
        path.write_bytes(bytes(_BYTES))
        return cls(rank, path)

    @classmethod
    def open(cls, directory: Path, rank: int) -> "RankMeter":
        """The reader's; the writer must have made it."""
        return cls(rank, _path(directory, rank))

    def finished(self, output: StepOutput) -> None:
        """A step has ended on this rank."""
        values = self._values
        values[2] += output.device_seconds
        if output.times is not None:
            values[3] += output.times.exposed_network_seconds
            values[1] += 1
        values[0] += 1

    def read(self) -> RankReading:
        """The counters now."""
        num_steps, num_timed_steps, device_seconds, exposed_network_seconds = self._values.tolist()
        return RankReading(
            num_steps=int(num_steps),
            num_timed_steps=int(num_timed_steps),
            device_seconds=device_seconds,
            exposed_network_seconds=exposed_network_seconds,
        )


def _path(directory: Path, rank: int) -> Path:
    return directory / f"meter-{rank}"
