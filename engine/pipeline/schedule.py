"""`Schedule`: the plan of one layer as data: which operation runs on which lane, on which tokens, in which order.

A schedule is one period of a layer that repeats for every layer of a model; a step with a `delay` belongs to the layer
that began so many periods before, which is how the tail of one layer overlaps the head of the next. Lanes run
their steps in order; between lanes, dependencies alone decide (`dependencies`). There are no times in it: those are
predicted from costs or measured.

The text form is exact, `Schedule.parse(str(schedule)) == schedule`:

    # anything after a hash sign is a comment
    nano-batches: 480+288 800+480
    compute: qkv_proj[0:768] o_proj[768:2048]*7 down_proj[768:2048]@1
    network: all_reduce[0:768]*2

`480+288` is a nano-batch of 480 decodes and 288 prefill tokens; `[0:768]` is a range of positions in the order of the
cut; `*7` is a share of seven tenths of the execution units (all ten where it is left out), `@1` a delay of one period.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from engine.errors import ConfigError
from engine.pipeline.nano_batch import Cut, NanoBatch

ALL_UNITS = 10
_CUT_KEY = "nano-batches"
_NANO_BATCH = re.compile(r"(\d+)\+(\d+)")
_STEP = re.compile(r"(?P<node>\w+)\[(?P<start>\d+):(?P<stop>\d+)\](?:\*(?P<share>\d+))?(?:@(?P<delay>\d+))?")


class ScheduleError(ConfigError):
    """A schedule that cannot be read, or that would not compute what the model does."""


class Lane(StrEnum):
    """What runs its steps one after the other, beside the other lanes."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"


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
    """One period: the cut, and the steps of each lane in order."""

    cut: Cut
    lanes: Mapping[Lane, tuple[Step, ...]]

    def __hash__(self) -> int:
        # Like equality, without regard to the order of the lanes.
        return hash((self.cut, frozenset(self.lanes.items())))

    def __str__(self) -> str:
        sizes = (f"{nano_batch.num_decodes}+{nano_batch.num_prefills}" for nano_batch in self.cut.nano_batches)
        lines = [f"{_CUT_KEY}: {' '.join(sizes)}"]
        lines += [f"{lane}: {' '.join(map(str, steps))}" for lane, steps in self.lanes.items()]
        return "\n".join(lines) + "\n"

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Read the text form; raises `ScheduleError` that names the line and what is wrong with it."""
        cut: Cut | None = None
        lanes: dict[Lane, tuple[Step, ...]] = {}
        for number, line in enumerate(text.splitlines(), 1):
            content = line.partition("#")[0].strip()
            if not content:
                continue
            key, colon, rest = (part.strip() for part in content.partition(":"))
            if not colon or key not in (_CUT_KEY, *Lane):
                raise ScheduleError(
                    f"line {number}: expected '{_CUT_KEY}:' or a lane ({', '.join(Lane)}), not {line!r}."
                )
            if key == _CUT_KEY and cut is None:
                cut = _parse_cut(rest, number)
            elif key != _CUT_KEY and Lane(key) not in lanes:
                lanes[Lane(key)] = tuple(_parse_step(word, number) for word in rest.split())
            else:
                raise ScheduleError(f"line {number}: {key!r} appears a second time.")
        if cut is None:
            raise ScheduleError(f"the line '{_CUT_KEY}: decodes+prefills ...' is missing.")
        return cls(cut, lanes)

    @property
    def steps(self) -> Iterator[tuple[Lane, Step]]:
        """Every step with its lane, lane by lane."""
        return ((lane, step) for lane, steps in self.lanes.items() for step in steps)

    def fits(self, num_decodes: int, num_prefills: int) -> bool:
        """Whether it can be scaled to such a batch: it must have a place for either kind of token that occurs."""
        return (self.cut.num_decodes > 0 or num_decodes == 0) and (self.cut.num_prefills > 0 or num_prefills == 0)

    def scaled(self, num_decodes: int, num_prefills: int) -> "Schedule":
        """The same plan for a batch of other sizes that it `fits`; steps that lose all their tokens disappear."""
        cut = self.cut.scaled(num_decodes, num_prefills)
        lanes = {
            lane: tuple(
                replace(step, start=start, stop=stop)
                for step in steps
                for start, stop in [(self.cut.position_in(cut, step.start), self.cut.position_in(cut, step.stop))]
                if stop > start
            )
            for lane, steps in self.lanes.items()
        }
        return Schedule(cut, lanes)


def _parse_cut(text: str, number: int) -> Cut:
    matches = [_NANO_BATCH.fullmatch(word) for word in text.split()]
    if not matches or None in matches:
        raise ScheduleError(f"line {number}: nano-batches are written decodes+prefills, such as 480+288, not {text!r}.")
    return Cut(tuple(NanoBatch(int(match[1]), int(match[2])) for match in matches if match is not None))


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
