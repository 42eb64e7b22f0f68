"""`Lanes`: what runs the steps of a schedule on a device; every device has its own kind."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.layers.collective import CollectiveOperation
from engine.pipeline.dispatch import Dispatch
from engine.pipeline.flight import Flight
from engine.pipeline.host_lanes import HostLanes
from engine.pipeline.lane_grants import LaneGrants
from engine.pipeline.layer_program import LayerProgram
from engine.pipeline.schedule import Mechanism
from engine.pipeline.stopwatch import Stopwatch
from engine.pipeline.stream_lanes import StreamLanes
from engine.pipeline.values import Values
from engine.units_at_hand import UnitsAtHand


class Lanes(Protocol):
    """Runs the layers of one rank; a step is begun after the one before was begun, from the same thread."""

    @property
    def runs_plainly(self) -> bool:
        """Whether the sequential schedule is better run by `plain_run`."""
        ...

    def begin(
        self,
        collective: CollectiveOperation,
        values_TE: Tensor,
        pieces: Sequence[tuple[int, int]],
        stopwatch: Stopwatch,
    ) -> Flight | None:
        """Compute a collective, in place, on the hidden states that the layers will read.

        `pieces` are the nano-batches' tokens, in the order in which they will be needed. The flight returned, if any,
        is still to be landed.
        """
        ...

    def run(
        self,
        order: Sequence[Dispatch],
        ranges: Sequence[tuple[int, int]],
        programs: Sequence[LayerProgram],
        values: Values,
        stopwatch: Stopwatch,
        mechanism: Mechanism = Mechanism.STREAMS,
        units: UnitsAtHand | None = None,
    ) -> None:
        """Run every step of the order on its range; `ranges` goes by the index of the step, `programs` by the layer.

        On return the results are there for what the calling thread computes next. `mechanism` is the schedule's, and
        `units` are what the model's kernels ask for how many they may take, where some do.
        """
        ...


def lanes_for(device: torch.device, *, overlaps: bool, grants: LaneGrants | None = None) -> Lanes:
    """New lanes of a device; with `overlaps` False they take turns. `grants`: see `StreamLanes`."""
    if device.type != "cuda":
        return HostLanes(overlaps=overlaps)
    return StreamLanes(device, overlaps=overlaps, grants=grants)
