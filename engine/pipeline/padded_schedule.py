"""`PaddedSchedule`: a planned schedule on rows that any decode and any prefill token may be given, for one CUDA graph.

A plan is made for one mix of decodes and prefill tokens; a graph has to serve the mixes around it. So a nano-batch
becomes a `PaddedNanoBatch`: its rows are not told apart before a step comes. Decode attention then goes over all its
lanes and prefill attention over all its rows, each leaving alone what belongs to the other, and the schedule says so:

- Where a node of both kinds is cut inside a nano-batch, the nano-batch is: each part has lanes and chunks of its own.
- Attention of one kind goes over each part by itself, prefill attention over the whole of it. Pieces of decode
  attention are pieces of the lanes.

Every step but decode attention then has whole parts, and where there are both kinds every part counts as having both.
So dependencies and lifetimes, which are derived from kinds and ranges, hold for whatever mix is there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

from engine.operation import TokenKind
from engine.pipeline.graph import OperationGraph
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.schedule import Schedule, ScheduleError, Step
from engine.pipeline.token_bucket import PaddedNanoBatch, TokenBucket, most_chunks

MOST_NANO_BATCHES = 8
# Nano-batches end where tiles of products do, as long as that moves them by no more than this part of a step.
_TILE = 128
_FINEST = 16
# Of a nano-batch's lanes: a piece of attention that ends this close to a part's last lane ends there.
_NEAR = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedSchedule:
    """`schedule` cuts the rows of `bucket` as that does."""

    schedule: Schedule
    bucket: TokenBucket


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Of planned nano-batch `number`: the positions, and the rows that stand for them."""

    number: int
    start: int
    stop: int
    first_row: int
    num_rows: int
    num_lanes: int = 0

    @property
    def last_row(self) -> int:
        """Behind it."""
        return self.first_row + self.num_rows


def padded_schedule(
    schedule: Schedule, graph: OperationGraph, num_tokens: int, most_decodes: int, max_sequences: int
) -> PaddedSchedule:
    """The schedule on `num_tokens` rows, for batches of at most so many decodes, as far as its nano-batches hold them.

    Raises `ScheduleError` where it cannot be told without naming the tokens.
    """
    alone = [
        each for each in schedule.cut.nano_batches if each.num_tokens and 0 in (each.num_decodes, each.num_prefills)
    ]
    if schedule.cut.num_decodes and schedule.cut.num_prefills and alone:
        raise ScheduleError(
            f"a nano-batch of {alone[0].num_decodes} decodes and {alone[0].num_prefills} prefill tokens, beside others "
            "with the other kind, has a place for that mix alone: each must have some of both."
        )
    kinds = {node.name: node.tokens for node in graph.nodes}
    parts = _with_lanes(schedule.cut, _parts(schedule, kinds, num_tokens), min(most_decodes, max_sequences))
    moved = _Moved(schedule, kinds, parts)
    lanes = {lane: [list(moved.steps(step)) for step in steps] for lane, steps in schedule.lanes.items()}
    queues = {lane: iter(steps) for lane, steps in lanes.items()}
    bucket = TokenBucket(
        tuple(
            PaddedNanoBatch(
                num_tokens=part.num_rows,
                num_lanes=part.num_lanes,
                num_chunks=most_chunks(part.num_rows, max_sequences) if schedule.cut.num_prefills else 0,
            )
            for part in parts
        )
    )
    cut = Cut(tuple(NanoBatch(each.num_lanes, each.num_tokens - each.num_lanes) for each in bucket.nano_batches))
    return PaddedSchedule(
        schedule=replace(
            schedule,
            cut=cut,
            lanes={lane: tuple(step for group in steps for step in group) for lane, steps in lanes.items()},
            starts=tuple(lane for lane in schedule.starts for _ in next(queues[lane])),
        ),
        bucket=bucket,
    )


def _parts(schedule: Schedule, kinds: Mapping[str, TokenKind], num_tokens: int) -> list[_Part]:
    """The planned nano-batches, cut where steps of both kinds, or of prefill tokens among themselves, are."""
    cut = schedule.cut
    borders = set(cut.borders)
    for _, step in schedule.steps:
        match kinds.get(step.node):
            case TokenKind.ALL:
                borders |= {step.start, step.stop}
            case TokenKind.PREFILL:
                borders |= {place for place in (step.start, step.stop) if _is_among_prefills(cut, place)}
    if len(borders) - 1 > MOST_NANO_BATCHES:
        raise ScheduleError(
            f"the steps cut the batch in {len(borders) - 1} parts: a graph can have at most {MOST_NANO_BATCHES}."
        )
    granule = min(_TILE, 2 ** max(0, (num_tokens // _FINEST).bit_length() - 1))
    rows = {
        place: num_tokens if place == cut.num_tokens else round(place * num_tokens / cut.num_tokens / granule) * granule
        for place in borders
    }
    found: list[_Part] = []
    for start, stop in pairwise(sorted(borders)):
        number = next(index for index, border in enumerate(cut.borders[1:]) if start < border)
        if rows[stop] - rows[start] < 2:
            raise ScheduleError(f"{num_tokens} rows are too few to be cut like {cut.num_tokens} tokens at {start}.")
        found.append(
            _Part(number=number, start=start, stop=stop, first_row=rows[start], num_rows=rows[stop] - rows[start])
        )
    return found


def _is_among_prefills(cut: Cut, place: int) -> bool:
    return any(
        border + nano_batch.num_decodes < place < border + nano_batch.num_tokens
        for border, nano_batch in zip(cut.borders, cut.nano_batches, strict=False)
    )


def _with_lanes(cut: Cut, parts: list[_Part], most_decodes: int) -> list[_Part]:
    """The parts with lanes for that many decodes, in the proportions of the plan; where there are prefill tokens, with
    a row for one.
    """
    if not cut.num_prefills or not cut.num_decodes:
        return [replace(part, num_lanes=part.num_rows if cut.num_decodes else 0) for part in parts]
    rows = [0] * len(cut.nano_batches)
    for part in parts:
        rows[part.number] += part.num_rows
    found: list[_Part] = []
    for part in parts:
        decodes = cut.nano_batches[part.number].num_decodes * part.num_rows / rows[part.number]
        wanted = ceil(most_decodes * decodes / cut.num_decodes)
        found.append(replace(part, num_lanes=min(max(1, wanted), part.num_rows - 1)))
    return found


class _Moved:
    """Where the steps of a schedule go."""

    def __init__(self, schedule: Schedule, kinds: Mapping[str, TokenKind], parts: list[_Part]) -> None:
        self._cut = schedule.cut
        self._kinds = kinds
        self._parts = parts
        self._rows = {part.start: part.first_row for part in parts} | {part.stop: part.last_row for part in parts}
        self._lane_of: dict[tuple[int, int], int] = {}
        places: dict[int, set[int]] = {}
        for _, step in schedule.steps:
            if kinds.get(step.node) is TokenKind.DECODE:
                for number, start, stop in self._decodes(step):
                    places.setdefault(number, set()).update((start, stop))
        for number, borders in places.items():
            self._lane_of |= self._lanes_at(number, sorted(borders))

    def steps(self, step: Step) -> Iterator[Step]:
        """What stands for a step."""
        match self._kinds.get(step.node):
            case TokenKind.DECODE:
                ranges = self._lane_ranges(step)
            case TokenKind.PREFILL:
                ranges = self._prefill_ranges(step)
            case TokenKind.ALL:
                ranges = iter([(self._rows[step.start], self._rows[step.stop])])
            case None:
                raise ScheduleError(f"{step}: the layer has no such node.")
        for start, stop in ranges:
            yield replace(step, start=start, stop=stop)

    def _decodes(self, step: Step) -> Iterator[tuple[int, int, int]]:
        """(nano-batch, its first decode and the one behind its last) that the step has."""
        for number, (border, nano_batch) in enumerate(zip(self._cut.borders, self._cut.nano_batches, strict=False)):
            start, stop = max(0, step.start - border), min(nano_batch.num_decodes, step.stop - border)
            if start < stop:
                yield number, start, stop

    def _lanes_at(self, number: int, places: list[int]) -> Iterator[tuple[tuple[int, int], int]]:
        """For places among a nano-batch's decodes the lane, counted through its parts."""
        ends = [0]
        for part in self._parts:
            if part.number == number:
                ends.append(ends[-1] + part.num_lanes)
        if len(places) == len(ends):  # each part has its piece
            yield from (((number, place), end) for place, end in zip(places, ends, strict=True))
            return
        for place in places:
            lane = round(place * ends[-1] / self._cut.nano_batches[number].num_decodes)
            nearest = min(ends, key=lambda end: abs(end - lane))
            yield (number, place), nearest if _NEAR * abs(nearest - lane) <= ends[-1] else lane

    def _lane_ranges(self, step: Step) -> Iterator[tuple[int, int]]:
        for number, start, stop in self._decodes(step):
            low, high = self._lane_of[number, start], self._lane_of[number, stop]
            before = 0
            for part in self._parts:
                if part.number == number:
                    first, last = max(low - before, 0), min(high - before, part.num_lanes)
                    if first < last:
                        yield part.first_row + first, part.first_row + last
                    before += part.num_lanes

    def _prefill_ranges(self, step: Step) -> Iterator[tuple[int, int]]:
        for part in self._parts:
            border, nano_batch = self._cut.borders[part.number], self._cut.nano_batches[part.number]
            middle = border + nano_batch.num_decodes
            if not (middle < border + nano_batch.num_tokens and step.start < border + nano_batch.num_tokens):
                continue
            start = border if step.start <= middle else step.start
            if middle < step.stop and start <= part.start and part.stop <= step.stop:
                yield part.first_row, part.last_row
