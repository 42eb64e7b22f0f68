"""`ReplicaStart`: how far a replica's start has come. Who writes and reads it is `cluster.startup`'s business."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from engine import MemoryUse


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStart:
    """A replica's state: bytes of weights read so far, when it was ready, or what stopped it.

    `doing` is what its ranks were busy with last, in words; `memory` what its processes hold, once it is ready. Times
    are Unix seconds. `is_lost` once it served and cannot any more, and `num_lost` is how many replicas of its
    application had come to such an end, or to none of their start, when this one began.
    """

    begun_at: float = 0.0
    done: int = 0
    total: int = 0
    doing: str = ""
    memory: tuple[MemoryUse, ...] = ()
    ready_at: float | None = None
    error: Exception | None = None
    is_lost: bool = False
    num_lost: int = 0


def gone(starts: Mapping[str, ReplicaStart], living: Collection[str]) -> set[str]:
    """The ids of replicas that will not serve again: those that said so, and those without a process."""
    return {replica_id for replica_id, start in starts.items() if start.is_lost or replica_id not in living}


def num_lost(starts: Iterable[ReplicaStart]) -> int:
    """How many replicas others took the place of. Those that scaling ends withdraw their reports, and do not count."""
    return max((start.num_lost for start in starts), default=0)
