"""`DeviceLanes`: the lanes of a rank's device, those that overlap and those that take turns, made once and kept.

Streams, and the parts of a device that is split, are few: whoever runs, tries, measures or records the rank's layers
shares them. Captured graphs need them, so they end after the last graph.
"""

import torch

from engine.pipeline.lane_grants import LaneGrants
from engine.pipeline.lanes import Lanes, lanes_for


class DeviceLanes:
    """Of one device, for one thread that launches. Nothing is made before it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._grants: LaneGrants | None = None
        self._lanes: dict[bool, Lanes] = {}

    def of(self, *, overlaps: bool) -> Lanes:
        """Always the same; with `overlaps` False they take turns."""
        if overlaps not in self._lanes:
            grants = self.grants if overlaps and self._device.type == "cuda" else None
            self._lanes[overlaps] = lanes_for(self._device, overlaps=overlaps, grants=grants)
        return self._lanes[overlaps]

    @property
    def grants(self) -> LaneGrants:
        """What the lanes of a CUDA device that overlap run on."""
        if self._grants is None:
            self._grants = LaneGrants(self._device)
        return self._grants

    def close(self) -> None:
        """Give back what the driver made. No graph that was captured on these lanes may be left. Idempotent."""
        self._lanes.clear()
        if self._grants is not None:
            self._grants.close()
            self._grants = None
