"""`BufferPlan`: where every value that passes between nodes lies in one arena, which serves all layers.

A value has a place for the rows of the whole batch, in the order of the cut, so that a consumer cut otherwise than
the producer reads a slice and nothing is copied. Places may have bytes in common where no rows of the one are ever
live at the same time as rows of the other (`find_lifetimes`). Rows of different nano-batches are not told apart there:
a schedule is scaled to every batch anew, and so is its arena, which must not be planned in every step. The layer's
input and its output are one value, handed from layer to layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from engine.pipeline.graph import LAYER_INPUT, OperationGraph
from engine.pipeline.lifetimes import Lifetime, find_lifetimes
from engine.pipeline.schedule import Schedule, ScheduleError

ALIGNMENT = 64
_MAX_ROUNDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferPlan:
    """Where the copies of every value, and of `LAYER_INPUT`, begin; layers take them in turn (mostly there is one).

    What the schedule never computes, such as a branch that it does not take, has no place.

    What goes into the first layer is written to `LAYER_INPUT` of layer 0, and what comes out is found in the graph's
    output of the last layer. A value of `in_place` is written over the one that it maps to. `widths` count elements
    of a token; all else is in bytes, for a batch of `num_tokens`.
    """

    offsets: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int]
    in_place: Mapping[str, str]
    element_bytes: int
    num_tokens: int
    num_layers: int
    num_bytes: int

    @property
    def naive_bytes(self) -> int:
        """What the values of one layer take if each has memory of its own."""
        widths = (width for value, width in self.widths.items() if value != LAYER_INPUT)
        return sum(widths) * self.num_tokens * self.element_bytes

    def scaled(self, num_tokens: int) -> "BufferPlan":
        """The plan of the same schedule, scaled to a batch of so many tokens."""
        return replace(
            self,
            offsets={
                value: tuple(offset // self.num_tokens * num_tokens for offset in copies)
                for value, copies in self.offsets.items()
            },
            num_tokens=num_tokens,
            num_bytes=self.num_bytes // self.num_tokens * num_tokens,
        )

    def address(self, value: str, layer: int, row: int = 0) -> int:
        """The byte of the arena where a row of the value begins in this layer."""
        copies = self.offsets[value]
        return copies[layer % len(copies)] + row * self.widths[value] * self.element_bytes


def plan_buffers(
    schedule: Schedule,
    graph: OperationGraph,
    widths: Mapping[str, int],
    element_bytes: int,
    *,
    num_layers: int,
    in_place: Mapping[str, str] | None = None,
    joined: Mapping[str, str] | None = None,
) -> BufferPlan:
    """Place the values of a verified schedule for a model of `num_layers` layers.

    `widths`: elements per token of every value (`Node.outputs`). `in_place`: values that are computed where their
    input lies. `joined`: values that lie in another's place because they have different rows of it. Raises
    `ScheduleError` for a missing width, and where memory would be written while an earlier value is still needed.
    """
    in_place, joined = in_place or {}, joined or {}
    missing = sorted(set(graph.producers) - set(widths))
    if missing:
        raise ScheduleError(f"the widths of {', '.join(missing)} are missing: give the elements of a token of each.")
    owners = _owners(graph, widths, {**joined, **in_place})
    lifetimes = find_lifetimes(schedule, graph, owners, in_place, num_layers)
    row_bytes = {owner: widths[owner] * element_bytes for owner in owners.values()}
    sizes = {(lifetime.owner, lifetime.copy): row_bytes[lifetime.owner] for lifetime in lifetimes}
    places = _best_offsets(sizes, _forbidden(lifetimes, row_bytes))
    num_tokens = schedule.cut.num_tokens
    copies: dict[str, list[int]] = {}
    for owner, copy in sorted(places):
        copies.setdefault(owner, []).append(places[owner, copy] * num_tokens)
    offsets = {value: tuple(copies[owner]) for value, owner in owners.items() if owner in copies}
    output = offsets[graph.output]
    return BufferPlan(
        offsets={**offsets, LAYER_INPUT: (output[-1], *output[:-1])},  # the output of the layer before
        widths={**{value: widths[value] for value in offsets}, LAYER_INPUT: widths[graph.output]},
        in_place=dict(in_place),
        element_bytes=element_bytes,
        num_tokens=num_tokens,
        num_layers=num_layers,
        num_bytes=_end(places, sizes) * num_tokens,
    )


def _owners(graph: OperationGraph, widths: Mapping[str, int], shared: Mapping[str, str]) -> dict[str, str]:
    """For every value the one whose place it takes, as a rule its own."""
    owners = {}
    for value in graph.producers:
        owner = value
        for _ in shared:
            owner = shared.get(owner, owner)
        if owner not in graph.producers or widths[owner] != widths[value]:
            raise ScheduleError(f"{value} cannot lie where {owner} does: both must be values of the same width.")
        owners[value] = owner
    return owners


_Place = tuple[str, int]  # an owner and one of its copies
# For two places, the open interval in which the second's offset minus the first's must not lie.
_Forbidden = Mapping[tuple[_Place, _Place], tuple[int, int]]


def _forbidden(lifetimes: Sequence[Lifetime], row_bytes: Mapping[str, int]) -> _Forbidden:
    """Where two places must not lie towards each other, in bytes of a token: they would share one while both live."""
    found: dict[tuple[_Place, _Place], tuple[int, int]] = {}
    for first, second in combinations(lifetimes, 2):
        one, other = (first.owner, first.copy), (second.owner, second.copy)
        if one == other or (one, other) in found or not first.meets(second):  # the same place, or known
            continue
        mine, others = row_bytes[first.owner], row_bytes[second.owner]
        found[one, other], found[other, one] = (-others, mine), (-mine, others)
    return found


def _best_offsets(sizes: Mapping[_Place, int], forbidden: _Forbidden) -> dict[_Place, int]:
    """First fit, largest first; then swap two in that order for as long as this makes the arena smaller."""
    order = sorted(sizes, key=lambda place: -sizes[place])
    best = _first_fit(order, forbidden)
    for _ in range(_MAX_ROUNDS):
        before = _end(best, sizes)
        for left, right in combinations(range(len(order)), 2):
            swapped = list(order)
            swapped[left], swapped[right] = order[right], order[left]
            tried = _first_fit(swapped, forbidden)
            if _end(tried, sizes) < _end(best, sizes):
                order, best = swapped, tried
        if _end(best, sizes) == before:
            break
    return best


def _first_fit(order: Sequence[_Place], forbidden: _Forbidden) -> dict[_Place, int]:
    """One after the other at the lowest offset that those before it leave free."""
    offsets: dict[_Place, int] = {}
    for place in order:
        taken = sorted(
            (begin + offset, end + offset)
            for other, offset in offsets.items()
            if (other, place) in forbidden
            for begin, end in [forbidden[other, place]]
        )
        offset = 0
        for begin, end in taken:
            if begin < offset < end:
                offset = -(-end // ALIGNMENT) * ALIGNMENT
        offsets[place] = offset
    return offsets


def _end(offsets: Mapping[_Place, int], sizes: Mapping[_Place, int]) -> int:
    return max((offset + sizes[place] for place, offset in offsets.items()), default=0)
