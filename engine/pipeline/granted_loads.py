"""`GrantedLoads`: loads as steps of a schedule would run them on a GPU: on the stream of a lane, with its units.

So what the profiler times is granted by the code that serves (`LaneGrants`), by every mechanism and share.
"""

import logging
from collections.abc import Mapping

import torch

from engine.pipeline.lane_grants import LaneGrants
from engine.pipeline.schedule import ALL_UNITS, Lane, Mechanism
from engine.pipeline.timer import Load
from engine.units_at_hand import UnitsAtHand

_log = logging.getLogger(__name__)

# What the memory lane has where a pair is measured, and by which the device is asked whether it can be split.
PAIRED_SHARE = 3
# Two parts of a device: beyond half of it the memory lane would gain nothing that the compute lane does not miss more.
SPLIT_SHARES = (2, 3, 4, 5)


class GrantedLoads:
    """On one device; `units` is what the model's kernels ask, None where none do. `grants`: those of lanes that others
    run on, too.
    """

    def __init__(self, device: torch.device, units: UnitsAtHand | None, grants: LaneGrants | None = None) -> None:
        self._device = device
        self._units = units
        self._grants = grants or LaneGrants(device)

    def offered(self) -> dict[Mechanism, bool]:
        """Whether lanes can overlap by each mechanism here; why they cannot is logged."""
        offered = {}
        for mechanism in Mechanism:
            reason = self._grants.refusal(mechanism, self._units, PAIRED_SHARE)
            offered[mechanism] = reason is None
            if reason is not None:
                _log.warning("Lanes that overlap by %s are not measured and not planned: %s", mechanism, reason)
        return offered

    def load(self, load: Load, mechanism: Mechanism, lane: Lane, share: int) -> Load:
        """The same work as a step with so many tenths does it."""
        grant = self._grants.of(mechanism, lane, share)

        def run() -> None:
            current = torch.cuda.current_stream(self._device)
            if grant.stream is not None:
                grant.stream.wait_stream(current)
            with torch.cuda.stream(grant.stream), self._grants.units.launching(grant.units, self._units):
                load.run()
            if grant.stream is not None:
                current.wait_stream(grant.stream)

        return Load(run)


def measured_shares(mechanism: Mechanism, lane: Lane) -> tuple[int, ...]:
    """The shares of a lane that are worth measuring, ascending."""
    match mechanism:
        case Mechanism.STREAMS:
            return tuple(range(1, ALL_UNITS))
        case Mechanism.GREEN:
            return SPLIT_SHARES if lane is Lane.MEMORY else tuple(ALL_UNITS - share for share in SPLIT_SHARES[::-1])
        case Mechanism.CORESIDENT:
            return (ALL_UNITS,)


def shares_of(mechanism: Mechanism, memory_share: int) -> Mapping[Lane, int]:
    """What the steps of each lane have where all of a lane have the same and the memory lane has so much."""
    if mechanism is Mechanism.CORESIDENT:
        return dict.fromkeys(Lane, ALL_UNITS)
    return {Lane.COMPUTE: ALL_UNITS - memory_share, Lane.MEMORY: memory_share, Lane.NETWORK: ALL_UNITS}
