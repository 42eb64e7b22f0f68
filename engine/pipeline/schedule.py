"""`Schedule`: the plan of one layer as data: which operation runs on which lane, on which tokens, in which order.

A schedule is one period of a layer that repeats for every layer of a model; a step with a `delay` belongs to the layer
that began so many periods before, which is how the tail of one layer overlaps the head of the next. Lanes run
their steps in order; between lanes, dependencies alone decide (`dependencies`). There are no times in it: those are
predicted from costs or measured.

The text form is exact, `Schedule.parse(str(schedule)) == schedule`:

    # anything after a hash sign is a comment
    nano-batches: 480+288 800+480
    overlap: streams
    compute: qkv_proj[0:768] o_proj[768:2048]*7 down_proj[768:2048]@1
    network: all_reduce[0:768]*2
    starts: CCNC

`480+288` is a nano-batch of 480 decodes and 288 prefill tokens; `[0:768]` is a range of positions in the order of the
cut; `*7` is a share of seven tenths of the execution units (all ten where it is left out), `@1` a delay of one period.
`overlap` is the `Mechanism`, `streams` where it is left out. `starts`, where it is given, is the order in which the
steps of all lanes may start in a period, by the first letters of their lanes: shares that fit together as planned may
not fit if a step that is ready early goes first.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from engine.errors import ConfigError
from engine.pipeline.nano_batch import Cut, NanoBatch

ALL_UNITS = 10
# A delay says how many layers a nano-batch is behind; more than a few would only lengthen the ramps.
LARGEST_DELAY = 99
_CUT_KEY = "nano-batches"
_MECHANISM_KEY = "overlap"
_STARTS_KEY = "starts"
_NUMBER = "[0-9]{1,9}"
_NANO_BATCH = re.compile(rf"({_NUMBER})\+({_NUMBER})")
_STEP = re.compile(
    rf"(?P<node>\w+)\[(?P<start>{_NUMBER}):(?P<stop>{_NUMBER})\](?:\*(?P<share>{_NUMBER}))?(?:@(?P<delay>{_NUMBER}))?"
)


class ScheduleError(ConfigError):
    """A schedule that cannot be read, or that would not compute what the model does."""


class Lane(StrEnum):
    """What runs its steps one after the other, beside the other lanes."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"


class Mechanism(StrEnum):
    """What a GPU runs lanes beside each other by; on a CPU and for collectives it means nothing.

    STREAMS: kernels keep to their shares of the units by how many programs they launch; nothing is reserved. GREEN: the
    units are split in two for the whole step, one part for the compute lane and one for the memory lane; so every step
    of a lane has the same share. CORESIDENT: every unit runs both lanes, by kernels that leave each other room; so
    every step has all units.
    """

    STREAMS = "streams"
    GREEN = "green"
    CORESIDENT = "coresident"


_LETTERS = {lane: lane[0].upper() for lane in Lane}


@dataclass(frozen=True, slots=True)
class Step:
    """One nano-operation: a node of the graph on positions `start` to `stop`, with `share` tenths of the units."""

    node: str
    start: int
    stop: int
    share: int = ALL_UNITS
    delay: int = 0

    def __str__(self) -> str:
        share = "" if self.share == ALL_UNITS else f"*{self.share}"
        return f"{self.node}[{self.start}:{self.stop}]{share}" + (f"@{self.delay}" if self.delay else "")


@dataclass(frozen=True)
class Schedule:
    """One period: the cut, the steps of each lane in order, the lanes in the order of their starts (or nothing), and
    what lanes overlap by.
    """

    cut: Cut
    lanes: Mapping[Lane, tuple[Step, ...]]
    starts: tuple[Lane, ...] = ()
    mechanism: Mechanism = Mechanism.STREAMS

    def __hash__(self) -> int:
        # Like equality, without regard to the order of the lanes.
        return hash((self.cut, frozenset(self.lanes.items()), self.mechanism))

    def __str__(self) -> str:
        sizes = (f"{nano_batch.num_decodes}+{nano_batch.num_prefills}" for nano_batch in self.cut.nano_batches)
        lines = [f"{_CUT_KEY}: {' '.join(sizes)}"]
        if self.mechanism is not Mechanism.STREAMS:
            lines.append(f"{_MECHANISM_KEY}: {self.mechanism}")
        lines += [f"{lane}: {' '.join(map(str, self.lanes[lane]))}" for lane in Lane if lane in self.lanes]
        if self.starts:
            lines.append(f"{_STARTS_KEY}: {''.join(_LETTERS[lane] for lane in self.starts)}")
        return "\n".join(lines) + "\n"

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Read the text form; raises `ScheduleError` that names the line and what is wrong with it."""
        cut: Cut | None = None
        lanes: dict[Lane, tuple[Step, ...]] = {}
        starts: tuple[Lane, ...] = ()
        mechanism = Mechanism.STREAMS
        seen: set[str] = set()
        for number, line in enumerate(text.splitlines(), 1):
            content = line.partition("#")[0].strip()
            if not content:
                continue
            key, colon, rest = (part.strip() for part in content.partition(":"))
            if not colon or key not in (_CUT_KEY, _MECHANISM_KEY, _STARTS_KEY, *Lane):
                raise ScheduleError(
                    f"line {number}: expected '{_CUT_KEY}:', '{_MECHANISM_KEY}:', '{_STARTS_KEY}:' or a lane "
                    f"({', '.join(Lane)}), not {line!r}."
                )
            if key in seen:
                raise ScheduleError(f"line {number}: {key!r} appears a second time.")
            seen.add(key)
            if key == _CUT_KEY:
                cut = _parse_cut(rest, number)
            elif key == _MECHANISM_KEY:
                mechanism = _parse_mechanism(rest, number)
            elif key == _STARTS_KEY:
                starts = _parse_starts(rest, number)
            else:
                lanes[Lane(key)] = tuple(_parse_step(word, number) for word in rest.split())
        if cut is None:
            raise ScheduleError(f"the line '{_CUT_KEY}: decodes+prefills ...' is missing.")
        if starts and any(starts.count(lane) != len(lanes.get(lane, ())) for lane in Lane):
            raise ScheduleError(f"'{_STARTS_KEY}:' must have one letter for every step of every lane.")
        return cls(cut, lanes, starts, mechanism)

    @property
    def steps(self) -> Iterator[tuple[Lane, Step]]:
        """Every step with its lane, lane by lane in the order of `Lane`, so that equal schedules number them alike."""
        return ((lane, step) for lane in Lane for step in self.lanes.get(lane, ()))

    def fits(self, num_decodes: int, num_prefills: int) -> bool:
        """Whether it can be scaled to such a batch: it must have a place for either kind of token that occurs."""
        return (self.cut.num_decodes > 0 or num_decodes == 0) and (self.cut.num_prefills > 0 or num_prefills == 0)

    def scaled(self, num_decodes: int, num_prefills: int) -> "Schedule":
        """The same plan for a batch of other sizes that it `fits`.

        Steps that lose all their tokens disappear, and where none are left to overlap, so does the mechanism.
        """
        cut = self.cut.scaled(num_decodes, num_prefills)
        scaled = {
            lane: [
                replace(step, start=self.cut.position_in(cut, step.start), stop=self.cut.position_in(cut, step.stop))
                for step in steps
            ]
            for lane, steps in self.lanes.items()
        }
        queues = {lane: iter(steps) for lane, steps in scaled.items()}
        starts = tuple(lane for lane in self.starts for step in [next(queues[lane])] if step.stop > step.start)
        lanes = {lane: tuple(step for step in steps if step.stop > step.start) for lane, steps in scaled.items()}
        overlaps = all(lanes.get(lane) for lane in (Lane.COMPUTE, Lane.MEMORY))
        return Schedule(cut, lanes, starts, self.mechanism if overlaps else Mechanism.STREAMS)


def _parse_cut(text: str, number: int) -> Cut:
    matches = [_NANO_BATCH.fullmatch(word) for word in text.split()]
    if not matches or None in matches:
        raise ScheduleError(f"line {number}: nano-batches are written decodes+prefills, such as 480+288, not {text!r}.")
    return Cut(tuple(NanoBatch(int(match[1]), int(match[2])) for match in matches if match is not None))


def _parse_mechanism(text: str, number: int) -> Mechanism:
    if text not in tuple(Mechanism):
        raise ScheduleError(f"line {number}: lanes overlap by {', '.join(Mechanism)}, not by {text!r}.")
    return Mechanism(text)


def _parse_starts(text: str, number: int) -> tuple[Lane, ...]:
    lanes = {letter: lane for lane, letter in _LETTERS.items()}
    unknown = sorted(set(text) - set(lanes))
    if unknown or not text:
        raise ScheduleError(f"line {number}: the starts are written as letters {''.join(lanes)}, not {text!r}.")
    return tuple(lanes[letter] for letter in text)


def _parse_step(word: str, number: int) -> Step:
    match = _STEP.fullmatch(word)
    if match is None:
        raise ScheduleError(
            f"line {number}: a step is written node[start:stop], then *share and @delay where needed, not {word!r}."
        )
    start, stop, share = int(match["start"]), int(match["stop"]), int(match["share"] or ALL_UNITS)
    if stop <= start:
        raise ScheduleError(f"line {number}: {word!r} has no tokens: its range must end after it begins.")
    if not 1 <= share <= ALL_UNITS:
        raise ScheduleError(f"line {number}: the share of {word!r} must be 1 to {ALL_UNITS} tenths.")
    return Step(match["node"], start, stop, share, int(match["delay"] or 0))
