"""`OverlapCosts`: prices where every step of a lane has the same units: green parts and co-resident kernels give no
others, and by streams it is the simplest way.

There is nothing to divide while the layers run: how fast a node is follows from its lane, and only from that. How the
units are split is decided before the search, by the lane that takes longer: whatever the order, no period is shorter.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from engine.batch_shape import BatchShape
from engine.operation import TokenKind
from engine.pipeline.cost_model import Mode
from engine.pipeline.granted_loads import SPLIT_SHARES, shares_of
from engine.pipeline.graph import Node, OperationGraph
from engine.pipeline.placement import GPU_LANES, lane_of
from engine.pipeline.profile import MeasuredCosts
from engine.pipeline.schedule import ALL_UNITS, Lane, Mechanism, Schedule


@dataclass(frozen=True)
class OverlapCosts:
    """The `CostModel` over a profile by `mechanism`; co-resident kernels have all units, whatever `memory_share` is."""

    mechanism: Mechanism
    measured: MeasuredCosts
    memory_share: int

    @classmethod
    def of(cls, mechanism: Mechanism, costs: MeasuredCosts, shape: BatchShape) -> "OverlapCosts":
        """With the split that suits a batch; raises `ConfigError` where the profile has nothing of the mechanism."""
        measured = MeasuredCosts(costs.profile.by(mechanism), costs.graph)
        splits = [cls(mechanism, measured, share) for share in SPLIT_SHARES]
        return min(splits, key=lambda split: split.longest_lane_seconds(shape))

    @property
    def source(self) -> str:
        """Where the prices come from, for people."""
        return f"{self.measured.source}, lanes that overlap by {self.mechanism}"

    @property
    def shares_units(self) -> bool:
        """No: what a lane has, no other can take."""
        return False

    def seconds(self, node: Node, shape: BatchShape) -> float:
        """Time of `node` for the tokens of `shape`, alone, with all units."""
        return self.measured.seconds(node, shape)

    def modes(self, node: Node) -> tuple[Mode, ...]:
        """One: what its lane has."""
        return (Mode(ALL_UNITS, self.speed(node, ALL_UNITS, ())),)

    def speed(self, node: Node, share: int, beside: Sequence[tuple[Node, int]]) -> float:
        """The speed with what the node's lane has, whatever share is asked for."""
        return self.measured.speed(node, self._shares[lane_of(node, GPU_LANES)], beside)

    def longest_lane_seconds(self, shape: BatchShape) -> float:
        """What a lane takes for its work on a batch without a break: the most of all lanes."""
        absent = {TokenKind.DECODE} if not shape.num_decodes else set()
        absent |= {TokenKind.PREFILL} if not shape.num_prefills else set()
        seconds = dict.fromkeys(GPU_LANES, 0.0)
        for node in _first_branch(self.measured.graph):
            if node.tokens not in absent:
                seconds[lane_of(node, GPU_LANES)] += self.seconds(node, shape) / self.speed(node, ALL_UNITS, ())
        return max(seconds.values())

    def overlapped(self, schedule: Schedule) -> Schedule | None:
        """A schedule that was planned with these prices, to be run as they say; None where nothing of it overlaps."""
        if not all(schedule.lanes.get(lane) for lane in (Lane.COMPUTE, Lane.MEMORY)):
            return None
        lanes = {
            lane: tuple(replace(step, share=self._shares[lane]) for step in steps)
            for lane, steps in schedule.lanes.items()
        }
        return replace(schedule, lanes=lanes, mechanism=self.mechanism)

    @cached_property
    def _shares(self) -> Mapping[Lane, int]:
        return shares_of(self.mechanism, self.memory_share)


def _first_branch(graph: OperationGraph) -> Collection[Node]:
    others = set(graph.branches[1:])
    return [node for node in graph.nodes if node.branch not in others]
