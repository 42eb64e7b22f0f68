"""`Pairing`: which nodes of a layer are measured beside each other, and what a profile holds of that.

The network beside whatever computes; on a GPU the compute beside the memory lane, by every mechanism.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from engine.operation import Resource
from engine.pipeline.graph import Node, OperationGraph
from engine.pipeline.overlap_profile import Interference
from engine.pipeline.placement import GPU_LANES, lane_of
from engine.pipeline.profile import Profile
from engine.pipeline.schedule import Lane, Mechanism


@dataclass(frozen=True, slots=True)
class Pairing:
    """A node beside others that cost alike, of which one is measured for all."""

    mechanism: Mechanism
    node: Node
    others: tuple[Node, ...]

    def missing_in(self, profile: Profile) -> tuple[Node, ...]:
        """Those of the others beside which the profile does not have the node."""
        if self.mechanism not in profile.mechanisms:
            return self.others
        is_streams = self.mechanism is Mechanism.STREAMS
        found = profile.interference if is_streams else profile.overlap[self.mechanism].interference
        pairs = {(pair.node, pair.beside) for pair in found}
        return tuple(other for other in self.others if (self.node.name, other.name) not in pairs)

    def added_to(self, profile: Profile, others: Collection[Node], speeds: tuple[float, float]) -> Profile:
        """The profile with the speed of the node beside these others, and of each beside it."""
        found = tuple(
            pair
            for other in others
            for pair in (
                Interference(self.node.name, other.name, speeds[0]),
                Interference(other.name, self.node.name, speeds[1]),
            )
        )
        if self.mechanism is Mechanism.STREAMS:
            return replace(profile, interference=(*profile.interference, *found))
        return profile.with_overlap(self.mechanism, interference=found)


def pairings(graph: OperationGraph, mechanisms: Collection[Mechanism]) -> Iterator[Pairing]:
    """Without `mechanisms` lanes do not divide a device's units, as on a CPU. Beside a collective all is by streams."""
    alike: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.resource is Resource.NETWORK:
            alike.setdefault(repr([call.signature for call in node.calls]), []).append(node)
    for node in graph.nodes:
        if node.resource is not Resource.NETWORK:
            for nodes in alike.values():
                yield Pairing(Mechanism.STREAMS, node, tuple(nodes))
    lanes = {node.name: lane_of(node, GPU_LANES) for node in graph.nodes}
    for mechanism in mechanisms:
        for node in graph.nodes:
            for other in graph.nodes:
                if (lanes[node.name], lanes[other.name]) == (Lane.COMPUTE, Lane.MEMORY):
                    yield Pairing(mechanism, node, (other,))
