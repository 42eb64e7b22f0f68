"""`LaneGrants`: what the lanes of a CUDA device run on: for each mechanism a stream and execution units.

Streams and parts of the device are made when they are first asked for, and kept until `close`: captured graphs need
them.
"""

import logging
from dataclasses import dataclass

import torch

from engine.pipeline.execution_units import ExecutionUnits
from engine.pipeline.green_partition import GreenPart, GreenPartition, GreenPartitionError
from engine.pipeline.schedule import ALL_UNITS, Lane, Mechanism
from engine.units_at_hand import UnitGrant, UnitsAtHand

_log = logging.getLogger(__name__)

# Attention's few long-lived blocks must get onto the device between the many of a matrix product.
_HIGH_PRIORITY = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneGrant:
    """`stream` None is the current one."""

    stream: torch.cuda.Stream | None
    units: UnitGrant


class LaneGrants:
    """Of one device, for one thread that launches."""

    def __init__(self, device: torch.device) -> None:
        self.units = ExecutionUnits(device)
        self._device = device
        self._sides: dict[Lane, torch.cuda.Stream] = {
            Lane.MEMORY: torch.cuda.Stream(device, _HIGH_PRIORITY),  # type: ignore[no-untyped-call]
            Lane.NETWORK: torch.cuda.Stream(device),  # type: ignore[no-untyped-call]
        }
        self._partitions: dict[int, GreenPartition] = {}

    def of(self, mechanism: Mechanism, lane: Lane, share: int) -> LaneGrant:
        """For a step with so many tenths. Collectives have a stream of their own under every mechanism; their library
        decides what units they take.

        Raises `GreenPartitionError` where the driver does not split the device.
        """
        side = self._sides.get(lane)
        if mechanism is Mechanism.STREAMS or lane is Lane.NETWORK:
            return LaneGrant(stream=side, units=self.units.share(share))
        if mechanism is Mechanism.CORESIDENT:
            return LaneGrant(stream=side, units=UnitGrant(num_units=self.units.total, is_apart=False, has_guest=True))
        part = self._partition(share if lane is Lane.MEMORY else ALL_UNITS - share)[lane]
        return LaneGrant(stream=part.stream, units=UnitGrant(num_units=part.num_sms))

    def refusal(self, mechanism: Mechanism, at_hand: UnitsAtHand | None, memory_share: int) -> str | None:
        """Why steps cannot overlap by a mechanism here, with such a share for the memory lane; None where they can.

        To be asked before anything is captured. `at_hand`: what the model's kernels ask for their units, None where
        none do.
        """
        match mechanism:
            case Mechanism.STREAMS:
                return None
            case Mechanism.CORESIDENT:
                return "no kernel of the model's asks what it runs beside" if at_hand is None else at_hand.no_guests
            case Mechanism.GREEN:
                try:
                    self._partition(memory_share)
                except GreenPartitionError as error:
                    return str(error)
                return None

    def _partition(self, memory_share: int) -> dict[Lane, GreenPart]:
        """The two parts; the driver is asked for the smaller one, whose size is a multiple of its granule."""
        smaller = min(memory_share, ALL_UNITS - memory_share)
        lanes, priorities = (Lane.MEMORY, Lane.COMPUTE), (_HIGH_PRIORITY, 0)
        if smaller != memory_share:
            lanes, priorities = (Lane.COMPUTE, Lane.MEMORY), (0, _HIGH_PRIORITY)
        if memory_share not in self._partitions:
            num_first = self.units.granted(smaller)
            self._partitions[memory_share] = GreenPartition.split(self._device, num_first, priorities=priorities)
        split = self._partitions[memory_share]
        return dict(zip(lanes, (split.first, split.second), strict=True))

    def close(self) -> None:
        """Give the parts of the device back; no graph that was captured on them may be left. Idempotent.

        What fails is logged: whoever closes has nothing else to try, and other things to close.
        """
        while self._partitions:
            _, partition = self._partitions.popitem()
            try:
                partition.destroy()
            except RuntimeError as error:  # the driver's refusal, or torch's of a device that has failed
                _log.warning("A part of the device was not given back: %s", error)
