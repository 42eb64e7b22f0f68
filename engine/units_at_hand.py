"""`UnitsAtHand`: the execution units (SMs) that kernels may take now: who launches grants them, kernels' callers read.

One object belongs to one rank's model and to the thread that launches for it. A captured graph keeps what was granted
while it was captured.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitGrant:
    """`num_units` of a device, for a launch.

    `is_apart`: nothing else is on them, because they are all or a part that was split off; so a kernel may put several
    programs on each. Otherwise its programs go wherever there is room, and one for each unit are as many as keep to
    their number. `has_guest`: another kernel is meant to be on the same units, so kernels leave room for it.
    """

    num_units: int
    is_apart: bool = True
    has_guest: bool = False

    @property
    def most_programs(self) -> int | None:
        """Of a kernel that otherwise launches one for each piece of its work; None for no limit."""
        return None if self.is_apart or self.has_guest else self.num_units


class UnitsAtHand:
    """`grant` is what there is now: all of `total` unless somebody granted less.

    `no_guests` says why the model's kernels cannot share their units; None where they can.
    """

    def __init__(self, total: int, no_guests: str | None = None) -> None:
        self.total = total
        self.no_guests = no_guests
        self.grant = UnitGrant(num_units=total)

    @contextmanager
    def granted(self, grant: UnitGrant) -> Iterator[None]:
        """What is launched inside has this grant; afterwards it is as before."""
        before, self.grant = self.grant, grant
        try:
            yield
        finally:
            self.grant = before
