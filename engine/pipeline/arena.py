"""`Arena`: the memory of all values between nodes, laid out for each schedule by `plan_buffers`, grown when need be."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.pipeline.buffers import BufferPlan, plan_buffers
from engine.pipeline.graph import LAYER_INPUT
from engine.pipeline.layer_program import shared_places
from engine.pipeline.schedule import Schedule
from engine.pipeline.tracer import TracedLayer
from engine.pipeline.verify_buffers import verify_buffers


@dataclass(frozen=True, slots=True)
class RowShapes:
    """The shape of one token's row of every value, and the dtype that they share."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> "RowShapes":
        """Those of values [tokens, ...]."""
        dtypes = {value.dtype for value in values.values()}
        assert len(dtypes) == 1, f"values between nodes have several dtypes: {dtypes}"
        return cls({name: tuple(value.shape[1:]) for name, value in values.items()}, dtypes.pop())


class Arena:
    """One rank's. Steps of all schedules and graphs use the same memory, one after the other."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._plans: dict[tuple[Schedule, str, int], BufferPlan] = {}

    @property
    def num_bytes(self) -> int:
        """What it holds, which only grows."""
        return len(self._memory)

    def places(
        self,
        schedule: Schedule,
        traced: TracedLayer,
        num_layers: int,
        rows: RowShapes,
        num_tokens: int,
        device: torch.device,
    ) -> dict[str, Sequence[Tensor]]:
        """For every value its rows [num_tokens, ...], in the copies that layers take in turn."""
        plan = self.reserve(schedule, traced, num_layers, rows, num_tokens, device)
        return {
            value: [self._view(offset, rows.shapes[value], rows.dtype, num_tokens) for offset in copies]
            for value, copies in plan.offsets.items()
            if value != LAYER_INPUT
        }

    def reserve(
        self,
        schedule: Schedule,
        traced: TracedLayer,
        num_layers: int,
        rows: RowShapes,
        num_tokens: int,
        device: torch.device,
    ) -> BufferPlan:
        """Have memory for a step of the schedule with so many tokens, and tell what lies where.

        Raises `ScheduleError` where values that are live together would share memory.
        """
        key = (schedule, traced.graph.signature, num_layers)
        if key not in self._plans:
            in_place, joined = shared_places(traced)
            layout = plan_buffers(
                schedule,
                traced.graph,
                {value: math.prod(rows.shapes[value]) for value in traced.graph.producers},
                rows.dtype.itemsize,
                num_layers=num_layers,
                in_place=in_place,
                joined=joined,
            )
            verify_buffers(layout, schedule, traced.graph)
            self._plans[key] = layout
        plan = self._plans[key].scaled(num_tokens)
        if len(self._memory) < plan.num_bytes:
            self._memory = torch.empty(plan.num_bytes, dtype=torch.uint8, device=device)
        return plan

    def _view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype, num_tokens: int) -> Tensor:
        num_bytes = num_tokens * math.prod(shape) * dtype.itemsize
        return self._memory[offset : offset + num_bytes].view(dtype).view(num_tokens, *shape)
