"""`AgreedTimes`: what loads take, alone, by shares of the units and beside each other, agreed on by a group of ranks.

Repetitions go round the loads so that a disturbance hits all of them alike, and each counts with its median. All ranks
time the same loads in the same order and end with the same numbers: the slowest rank's time, and for a collective the
time of the rank that entered it last.
"""

import math
import statistics
import time
from collections.abc import Sequence

from engine.pipeline.rank_agreement import RankAgreement
from engine.pipeline.timer import Load, Timer

_MIN_ROUNDS, _MAX_ROUNDS = 3, 200
_MAX_COLLECTIVES = 8
# Nothing is sped up by company or by fewer units, and nothing stands still for company; what was measured beyond is
# noise.
_SLOWEST, _FASTEST = 0.05, 1.0


class AgreedTimes:
    """Every method is called by all ranks together."""

    def __init__(self, ranks: RankAgreement, timer: Timer) -> None:
        self._ranks = ranks
        self._timer = timer

    def medians(self, loads: Sequence[Load], budget: float, is_network: bool) -> list[float]:
        """The median seconds of each load, in `budget` seconds of repetitions that go round all of them."""
        for load in loads:
            load.run()
        estimates = self._ranks.largest([self._cost_of(load, is_network) for load in loads])
        rounds = [_num_rounds(budget / len(loads), estimate) for estimate in estimates]
        samples: list[list[float]] = [[] for _ in loads]
        for number in range(max(rounds)):
            for load, count, found in zip(loads, rounds, samples, strict=True):
                if number < count:
                    found.append(self._once(load, is_network))
        medians = [statistics.median(found) for found in samples]
        # A rank that comes early to a collective waits there for the others: the last one's time is its own.
        return self._ranks.smallest(medians) if is_network else self._ranks.largest(medians)

    def speeds_of(self, loads: Sequence[Load]) -> list[float]:
        """The speeds of all loads but the first, which has all units, relative to it."""
        samples: list[list[float]] = [[] for _ in loads]
        for _ in range(2 * _MIN_ROUNDS):
            for each, found in zip(loads, samples, strict=True):
                found.append(self._timer.seconds(each))
        whole, *seconds = self._ranks.largest([statistics.median(found) for found in samples])
        return [min(_FASTEST, whole / second) for second in seconds]

    def pair_speeds(self, first: Load, second: Load, budget: float) -> tuple[float, float]:
        """Speeds of both while the other runs, relative to alone."""
        for load in (first, second):
            load.run()
        estimates = [self._once(first, is_network=True), self._once(second, is_network=True)]
        first_seconds, second_seconds = self._ranks.largest(estimates)
        num_second = min(_MAX_COLLECTIVES, math.ceil(2 * first_seconds / second_seconds))
        num_first = max(1, round(num_second * second_seconds / first_seconds))
        estimate = 2 * (num_first * first_seconds + num_second * second_seconds)
        speeds: tuple[list[float], list[float]] = ([], [])
        for _ in range(_num_rounds(budget, estimate)):
            alone = []
            for counts in ((num_first, 0), (0, num_second)):
                self._ranks.meet()
                alone.append(max(self._timer.together(first, counts[0], second, counts[1])))
            self._ranks.meet()
            together = self._timer.together(first, num_first, second, num_second)
            for found, speed in zip(speeds, overlapped_speeds((alone[0], alone[1]), together), strict=True):
                found.append(speed)
        first_speed, second_speed = self._ranks.smallest([statistics.median(found) for found in speeds])
        return first_speed, second_speed

    def _cost_of(self, load: Load, is_network: bool) -> float:
        """What a repetition takes with everything around it."""
        started = time.perf_counter()
        self._once(load, is_network)
        return time.perf_counter() - started

    def _once(self, load: Load, is_network: bool) -> float:
        if is_network:
            self._ranks.meet()
        return self._timer.seconds(load)


def overlapped_speeds(alone: tuple[float, float], together: tuple[float, float]) -> tuple[float, float]:
    """Speeds of two bodies of work while both run, from their seconds alone and when begun together.

    The one that ends later runs alone for the rest: what it did in that time does not count.
    """
    both = min(together)
    speeds = [(own - (ended - both)) / both for own, ended in zip(alone, together, strict=True)]
    first, second = (min(_FASTEST, max(_SLOWEST, speed)) for speed in speeds)
    return first, second


def _num_rounds(budget: float, seconds: float) -> int:
    return max(_MIN_ROUNDS, min(_MAX_ROUNDS, int(budget / max(seconds, 1e-9))))
