"""Where the time of a first token, and of a step, goes: from the marks that a server's processes wrote."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from http_path.http_load import LoadResult
from http_path.stage_clock.sitecustomize import FLUSH_SECONDS
from numpy.typing import NDArray

Times = NDArray[np.float64]  # of the monotonic clock, in seconds, ascending

SETTLE_SECONDS: Final = 4 * FLUSH_SECONDS  # after which the marks of what has ended are in the files
# Point -> what happens between the point before and it. A request begins in the client and ends there.
FIRST_TOKEN: Final = {
    "called": "client sends, HAProxy, HTTP parsed",
    "opened": "body read, checked, tokenized, routed",
    "submitted": "ingress to replica",
    "sent": "engine composes the step",
    "computing": "step to the rank",
    "computed": "model",
    "put": "tokens to the engine",
    "heard": "replica to ingress",
    "written": "text, JSON, HTTP written",
    "read": "HAProxy, client reads",
}
STEP: Final = {
    "put": "rank to engine",
    "heard": "replica to ingress",
    "written": "text, JSON, HTTP of all streams",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """How long one part took, over many requests or steps, in milliseconds."""

    name: str
    p50: float
    p99: float

    @classmethod
    def of(cls, name: str, seconds: Times) -> Self:
        """Of a sample; zeros for an empty one."""
        p50, p99 = np.percentile(seconds, (50, 99)).tolist() if len(seconds) else (0.0, 0.0)
        return cls(name=name, p50=1000 * p50, p99=1000 * p99)

    def to_json(self) -> dict[str, float | str]:
        """Rounded to microseconds."""
        return {"name": self.name, "p50_ms": round(self.p50, 3), "p99_ms": round(self.p99, 3)}


def read_marks(folder: Path) -> dict[str, Times]:
    """The marks of all processes, by point; a line that is still being written is left out."""
    marks: dict[str, list[float]] = {}
    for file in folder.glob("*.marks"):
        for line in file.read_text().split("\n")[:-1]:
            moment, _, point = line.partition(" ")
            marks.setdefault(point, []).append(float(moment))
    return {point: np.sort(np.array(moments)) for point, moments in marks.items()}


def request_passes(marks: dict[str, Times], result: LoadResult) -> list[Times]:
    """Per request when it was sent, passed each point of `FIRST_TOKEN` and was read. Requests must not overlap."""
    passes = []
    for outcome in result.outcomes:
        assert outcome.first_output_at is not None, "the request was answered"
        times, read = [result.origin + outcome.sent_at], result.origin + outcome.first_output_at
        for point in list(FIRST_TOKEN)[:-1]:
            moments = marks.get(point, np.empty(0))
            index = int(np.searchsorted(moments, times[-1]))
            moment = float(moments[index]) if index < len(moments) else np.nan
            # The client may have read what was written before the writer comes to note that it has.
            times.append(min(moment, read) if point == "written" else moment)
        times.append(read)
        if np.all(np.diff(times) >= 0):  # else a mark is missing: NaN compares as false
            passes.append(np.array(times))
    return passes


def first_token_stages(passes: list[Times]) -> list[Stage]:
    """The parts of the time to the first token, and the whole."""
    parts = np.diff(np.array(passes), axis=1) if passes else np.empty((0, len(FIRST_TOKEN)))
    stages = [Stage.of(name, parts[:, column]) for column, name in enumerate(FIRST_TOKEN.values())]
    return [*stages, Stage.of("all", parts.sum(axis=1))]


def overhead(passes: list[Times]) -> tuple[Stage, Stage]:
    """The engine's own time, from a request's arrival in its queue to its first token, and the rest of HTTP's."""
    points = ["began", *FIRST_TOKEN]
    start, end = points.index("submitted"), points.index("put")
    own = np.array([times[end] - times[start] for times in passes])
    whole = np.array([times[-1] - times[0] for times in passes])
    return Stage.of("engine's own", own), Stage.of("HTTP minus engine", whole - own)


def step_stages(marks: dict[str, Times], result: LoadResult) -> list[Stage]:
    """The parts of a step's way from its rank to the sockets, for steps that ended during the load."""
    start, end = result.origin, result.origin + result.seconds
    within = {point: moments[(moments >= start) & (moments <= end)] for point, moments in marks.items()}
    puts, empty = within.get("put", np.empty(0)), np.empty(0)
    stages = [Stage.of("step, from one to the next", np.diff(puts))]
    stages.append(Stage.of(STEP["put"], _since_last(within.get("computed", empty), puts)))
    heard = _first_after(puts, within.get("heard", empty))
    stages.append(Stage.of(STEP["heard"], heard - puts[: len(heard)]))
    written = within.get("written", empty)
    index = np.searchsorted(written, np.append(heard[1:], end)) - 1 if len(written) else np.empty(0, dtype=int)
    last = written[np.maximum(index, 0)] if len(written) else empty
    stages.append(Stage.of(STEP["written"], (last - heard)[last > heard] if len(last) == len(heard) else empty))
    return stages


def longest_stall(marks: dict[str, Times], result: LoadResult) -> tuple[float, float, float]:
    """Seconds: the longest gap of a stream, the engine's longest between steps, and the longest gap beyond it.

    Of each gap of a stream the longest of the engine's gaps that overlap it is taken off: while a step runs no token
    can come. What is left is the path's own.
    """
    puts = marks.get("put", np.empty(0))
    steps = np.diff(puts)
    longest, stall, own = 0.0, 0.0, 0.0
    for outcome in result.outcomes:
        assert outcome.first_output_at is not None, "the request was answered"
        arrivals = result.origin + outcome.first_output_at + np.concatenate([[0.0], np.cumsum(outcome.gaps)])
        for begin, gap in zip(arrivals[:-1].tolist(), outcome.gaps.tolist(), strict=True):
            longest = max(longest, gap)
            if gap <= stall:
                continue
            first, last = np.searchsorted(puts, (begin, begin + gap))
            overlapping = steps[max(0, first - 1) : last]
            engine = float(overlapping.max()) if len(overlapping) else 0.0
            own = max(own, engine)
            stall = max(stall, gap - engine)
    return longest, own, stall


def _since_last(earlier: Times, moments: Times) -> Times:
    """For each moment the time since the last of `earlier`; those with none before them are left out."""
    index = np.searchsorted(earlier, moments, side="right") - 1
    return moments[index >= 0] - earlier[index[index >= 0]] if len(earlier) else np.empty(0)


def _first_after(moments: Times, later: Times) -> Times:
    """For each moment the first of `later` that follows; shorter where none follows the last ones."""
    index = np.searchsorted(later, moments)
    return later[index[index < len(later)]]
