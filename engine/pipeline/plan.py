"""`Plan`: what the planner found: a schedule, how long it should take, and how much better any other could be.

All times are predictions of the simulator from the cost model's prices; none was measured.
"""

from dataclasses import dataclass
from enum import StrEnum

from engine.pipeline.schedule import Schedule


class StopReason(StrEnum):
    """Why a search ended."""

    OPTIMAL = "no pipeline of the family is shorter, but for the rounding of times"
    EXHAUSTED = "every partition that could be better was searched, with interference as it is on average"
    TOLERANCE = "what could be better is less than the tolerance"
    TIME = "time was up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A schedule with its predicted times: from one layer to the next, and for all layers of a step."""

    schedule: Schedule
    period_seconds: float
    step_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchState:
    """How far a search is; periods in seconds."""

    elapsed_seconds: float
    period_seconds: float
    lower_bound_seconds: float
    num_solved: int
    num_partitions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`best` may be the sequential schedule; `candidates` are the best plans, best first, without it.

    `lower_bound_seconds`: no pipeline of `family` has a shorter period.
    """

    best: Candidate
    sequential: Candidate
    candidates: tuple[Candidate, ...]
    num_layers: int
    lower_bound_seconds: float
    family: str
    num_partitions: int
    num_solved: int
    solve_seconds: float
    stop_reason: StopReason

    @property
    def schedule(self) -> Schedule:
        """The schedule that is predicted to be the fastest."""
        return self.best.schedule

    @property
    def gap(self) -> float:
        """By what part of its period the best schedule could be improved at most."""
        return 1 - self.lower_bound_seconds / self.best.period_seconds if self.best.period_seconds else 0.0

    @property
    def speedup(self) -> float:
        """How many times as fast as the sequential schedule a step is predicted to be."""
        return self.sequential.step_seconds / self.best.step_seconds if self.best.step_seconds else 1.0
