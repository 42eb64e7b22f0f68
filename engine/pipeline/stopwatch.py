"""`Stopwatch`: where the time of one step went on one rank, by cost, and as timeline events where that is asked for."""

import time
from enum import StrEnum

from engine.batch import StepTimes
from engine.operation import Operation
from engine.pipeline.schedule import Lane
from engine.pipeline.timeline import TimelineEvent, union_seconds


class Cost(StrEnum):
    """What time spent in an operation is counted as (DESIGN.md, section 7)."""

    GEMM = "gemm"
    ATTENTION = "attention"
    NETWORK = "network"
    OTHER = "other"


class Stopwatch:
    """`seconds[cost]` of the compute lane, where NETWORK is time spent waiting for the network;
    `network_seconds` counts collectives waited for or not. Reads the host's clock, so it tells CPU lanes only.
    """

    def __init__(self, *, rank: int = 0, records_events: bool = False) -> None:
        self.seconds = dict.fromkeys(Cost, 0.0)
        self._flights: list[tuple[float, float]] = []
        self.events: list[TimelineEvent] | None = [] if records_events else None
        self.rank = rank
        self.began = time.perf_counter()  # what the events count from

    @staticmethod
    def now() -> float:
        """The clock that everything here is told by."""
        return time.perf_counter()

    def spent(self, cost: Cost, started: float) -> float:
        """Count the time since `started` on the compute lane; returns the time now."""
        now = time.perf_counter()
        self.seconds[cost] += now - started
        return now

    def spent_with_product(self, share: float, started: float) -> float:
        """As `spent`, for calls in one: `share` of the time is a matrix product's, the rest belongs to none."""
        now = time.perf_counter()
        self.seconds[Cost.GEMM] += share * (now - started)
        self.seconds[Cost.OTHER] += (1 - share) * (now - started)
        return now

    def flown(self, started: float, ended: float) -> None:
        """A collective was in flight; those in flight together count once."""
        self._flights.append((started, ended))

    @property
    def network_seconds(self) -> float:
        """Time with a collective in flight."""
        return union_seconds(self._flights)

    def times(self) -> StepTimes:
        """What was counted so far."""
        return StepTimes(
            gemm_seconds=self.seconds[Cost.GEMM],
            attention_seconds=self.seconds[Cost.ATTENTION],
            exposed_network_seconds=self.seconds[Cost.NETWORK],
            network_seconds=self.network_seconds,
        )

    def gathered(self, started: float, collective: Operation) -> None:
        """Count the time since `started`, in which nothing but this collective was run and waited for."""
        if collective.is_identity:  # what was left to do is no matter of the network
            self.spent(Cost.OTHER, started)
        else:
            self.flown(started, self.spent(Cost.NETWORK, started))

    def record(
        self,
        operation: str,
        lane: Lane,
        started: float,
        *,
        ended: float | None = None,
        layer: int | None = None,
        tokens: tuple[int, int] = (0, 0),
        nano_batch: int = 0,
    ) -> None:
        """Keep an event that ended now, or then, if events are recorded."""
        if self.events is not None:
            self.events.append(
                TimelineEvent(
                    operation=operation,
                    lane=lane,
                    start=started - self.began,
                    end=(self.now() if ended is None else ended) - self.began,
                    layer=layer,
                    start_token=tokens[0],
                    stop_token=tokens[1],
                    nano_batch=nano_batch,
                    rank=self.rank,
                )
            )
