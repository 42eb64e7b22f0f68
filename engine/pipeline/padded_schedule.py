"""`PaddedSchedule`: a planned schedule on rows that any decode and any prefill token may be given, for one CUDA graph.

A plan is made for one mix of decodes and prefill tokens; a graph has to serve the mixes around it. So a nano-batch
becomes a `PaddedNanoBatch`: its rows are not told apart before a step comes. Decode attention then goes over all its
lanes and prefill attention over all its rows, each leaving alone what belongs to the other. Where a node is cut inside
a nano-batch, the nano-batch is: each part has lanes and chunks of its own, so that a piece of decode attention has as
large a part of the decodes as the plan gave it, however many there are. Attention goes over each part by itself.

Every step then has whole parts, and a part of a nano-batch with both kinds counts as having both. So dependencies and
lifetimes, which are derived from kinds and ranges, hold for whatever mix is there. A nano-batch that was planned for
one kind alone stays so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

from engine.operation import TokenKind
from engine.pipeline.graph import OperationGraph
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.schedule import Schedule, ScheduleError, Step
from engine.pipeline.token_bucket import PaddedNanoBatch, TokenBucket, most_chunks
from engine.pipeline.verify import verify

MOST_NANO_BATCHES = 8
# Nano-batches end where tiles of products do, as long as that moves them by no more than this part of a step.
_TILE = 128
_FINEST = 16
# A piece of decode attention that ends within such a part of its nano-batch from where another node is cut ends there.
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
    last_row: int
    num_lanes: int = 0

    @property
    def num_rows(self) -> int:
        """From the first to before the last."""
        return self.last_row - self.first_row


def padded_schedule(
    schedule: Schedule, graph: OperationGraph, num_tokens: int, most_decodes: int, max_sequences: int
) -> PaddedSchedule:
    """The schedule on `num_tokens` rows, for batches of at most so many decodes, as far as its nano-batches hold them.

    Raises `ScheduleError` where it cannot be told without naming the tokens.
    """
    cut = schedule.cut
    if (
        cut.num_decodes
        and cut.num_prefills
        and not any(each.num_decodes and each.num_prefills for each in cut.nano_batches)
    ):
        raise ScheduleError(
            "its nano-batches have decodes or prefill tokens alone, and a place for one mix alone: one must have both."
        )
    borders = _Borders(schedule, {node.name: node.tokens for node in graph.nodes})
    parts = _with_lanes(cut, _parts(cut, borders.all, num_tokens), min(most_decodes, max_sequences))
    lanes = {
        lane: [[replace(step, start=start, stop=stop) for start, stop in borders.rows(step, parts)] for step in steps]
        for lane, steps in schedule.lanes.items()
    }
    queues = {lane: iter(steps) for lane, steps in lanes.items()}
    has_chunks = [cut.nano_batches[part.number].num_prefills > 0 for part in parts]
    bucket = TokenBucket(
        tuple(
            PaddedNanoBatch(
                num_tokens=part.num_rows,
                num_lanes=part.num_lanes,
                num_chunks=most_chunks(part.num_rows, max_sequences) if can_have else 0,
            )
            for part, can_have in zip(parts, has_chunks, strict=True)
        )
    )
    rows = Cut(tuple(NanoBatch(each.num_lanes, each.num_tokens - each.num_lanes) for each in bucket.nano_batches))
    moved = replace(
        schedule,
        cut=rows,
        lanes={lane: tuple(step for group in steps for step in group) for lane, steps in lanes.items()},
        starts=tuple(lane for lane in schedule.starts for _ in next(queues[lane])),
    )
    if moved.starts:
        try:
            verify(moved, graph)
        except ScheduleError:  # a part may wait for more than what it is a part of: lanes then decide by themselves
            moved = replace(moved, starts=())
    return PaddedSchedule(schedule=moved, bucket=bucket)


def _parts(cut: Cut, borders: Sequence[int], num_tokens: int) -> list[_Part]:
    """The parts between borders, and their rows."""
    granule = min(_TILE, 2 ** max(0, (num_tokens // _FINEST).bit_length() - 1))
    rows = [round(place * num_tokens / cut.num_tokens / granule) * granule for place in borders[:-1]] + [num_tokens]
    found: list[_Part] = []
    for (start, stop), (first_row, last_row) in zip(pairwise(borders), pairwise(rows), strict=True):
        if last_row - first_row < 2:
            raise ScheduleError(f"{num_tokens} rows are too few to be cut like {cut.num_tokens} tokens at {start}.")
        number = next(index for index, border in enumerate(cut.borders[1:]) if start < border)
        found.append(_Part(number=number, start=start, stop=stop, first_row=first_row, last_row=last_row))
    return found


def _with_lanes(cut: Cut, parts: list[_Part], most_decodes: int) -> list[_Part]:
    """The parts with lanes for that many decodes: all rows where nothing else can be, and in the others, in the
    proportions of the plan, as many more as are wanted; but a row for a prefill token.
    """
    rows = [0] * len(cut.nano_batches)
    for part in parts:
        rows[part.number] += part.num_rows
    planned = [cut.nano_batches[part.number] for part in parts]
    alone = [0 if each.num_prefills else part.num_rows for part, each in zip(parts, planned, strict=True)]
    wanted = max(0, most_decodes - sum(alone))
    shares = [
        each.num_decodes * part.num_rows / rows[part.number] if each.num_prefills else 0.0
        for part, each in zip(parts, planned, strict=True)
    ]
    mixed = [
        min(part.num_rows - 1, max(1, ceil(wanted * share / sum(shares)))) if share else 0
        for part, share in zip(parts, shares, strict=True)
    ]
    return [replace(part, num_lanes=max(*lanes)) for part, *lanes in zip(parts, alone, mixed, strict=True)]


class _Borders:
    """`all`: the positions of the plan where parts begin, and the end."""

    def __init__(self, schedule: Schedule, kinds: Mapping[str, TokenKind]) -> None:
        self._cut = schedule.cut
        self._kinds = kinds
        found = set(schedule.cut.borders)
        decodes: dict[int, set[int]] = {}  # where attention of a nano-batch's decodes is cut, counted in these
        for _, step in schedule.steps:
            match kinds.get(step.node):
                case TokenKind.ALL:
                    found |= {step.start, step.stop}
                case TokenKind.PREFILL:
                    found |= {place for place in (step.start, step.stop) if self._is_among_prefills(place)}
                case TokenKind.DECODE:
                    for number, start, stop in self._decodes(step):
                        decodes.setdefault(number, set()).update((start, stop))
                case None:
                    raise ScheduleError(f"{step}: the layer has no such node.")
        self._place_of = {
            (number, decode): place
            for number, cuts in decodes.items()
            for decode, place in self._placed(number, sorted(cuts), sorted(found)).items()
        }
        self.all = sorted(found.union(self._place_of.values()))
        if len(self.all) - 1 > MOST_NANO_BATCHES:
            raise ScheduleError(
                f"the steps cut the batch in {len(self.all) - 1} parts: a graph can have at most {MOST_NANO_BATCHES}."
            )

    def rows(self, step: Step, parts: Sequence[_Part]) -> Iterator[tuple[int, int]]:
        """The ranges of rows that a step has, in parts."""
        kind = self._kinds[step.node]
        if kind is TokenKind.ALL:
            inside = [part for part in parts if step.start <= part.start and part.stop <= step.stop]
            yield inside[0].first_row, inside[-1].last_row
            return
        for number, (border, nano_batch) in enumerate(zip(self._cut.borders, self._cut.nano_batches, strict=False)):
            start, stop = self._span(step, kind, number, border, nano_batch)
            for part in parts:
                if part.number == number and start <= part.start and part.stop <= stop:
                    last = part.last_row if kind is TokenKind.PREFILL else part.first_row + part.num_lanes
                    yield part.first_row, last

    def _span(self, step: Step, kind: TokenKind, number: int, border: int, nano_batch: NanoBatch) -> tuple[int, int]:
        """The positions of a nano-batch, of either kind, that stand for those of one kind that a step has."""
        middle, end = border + nano_batch.num_decodes, border + nano_batch.num_tokens
        if kind is TokenKind.PREFILL:
            if step.stop <= middle or end <= step.start or middle == end:
                return border, border
            return (border if step.start <= middle else step.start), step.stop
        for its, start, stop in self._decodes(step):
            if its == number:
                return self._place_of[number, start], self._place_of[number, stop]
        return border, border

    def _placed(self, number: int, decodes: Sequence[int], borders: Sequence[int]) -> dict[int, int]:
        """Where among a nano-batch's positions its decode attention is cut: where other nodes are, piece for piece, if
        they are cut in as many; else in proportion, or where one of them is near.
        """
        first, last = self._cut.borders[number : number + 2]
        inside = [border for border in borders if first <= border <= last]
        if len(decodes) == len(inside):
            return dict(zip(decodes, inside, strict=True))
        found: dict[int, int] = {}
        for decode in decodes:
            place = first + round(decode * (last - first) / self._cut.nano_batches[number].num_decodes)
            nearest = min(inside, key=lambda border: abs(border - place))
            found[decode] = nearest if _NEAR * abs(nearest - place) <= last - first else place
        return found

    def _decodes(self, step: Step) -> Iterator[tuple[int, int, int]]:
        """(nano-batch, its first decode and the one behind its last) that a step has."""
        for number, (border, nano_batch) in enumerate(zip(self._cut.borders, self._cut.nano_batches, strict=False)):
            start, stop = max(0, step.start - border), min(nano_batch.num_decodes, step.stop - border)
            if start < stop:
                yield number, start, stop

    def _is_among_prefills(self, place: int) -> bool:
        return any(
            border + nano_batch.num_decodes < place < border + nano_batch.num_tokens
            for border, nano_batch in zip(self._cut.borders, self._cut.nano_batches, strict=False)
        )
