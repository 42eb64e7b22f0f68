"""`ReplicaStart`: how far a replica's start has come. Who writes and reads them is `cluster.startup`'s business."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from engine import MemoryUse


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStart:
    """A replica's state: bytes of weights read so far, when it was ready, or what stopped it.

    `doing` is what its ranks were busy with last, in words; `memory` what its processes hold, once it is ready. Times
    are Unix seconds. `is_lost` once it served and cannot any more.
    """

    begun_at: float = 0.0
    done: int = 0
    total: int = 0
    doing: str = ""
    memory: tuple[MemoryUse, ...] = ()
    ready_at: float | None = None
    error: Exception | None = None
    is_lost: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStarts:
    """Those of an application, by the replica's id, and how many replicas others have taken the place of.

    What scaling ends withdraws its report, and does not count.
    """

    by_replica: Mapping[str, ReplicaStart] = field(default_factory=dict)
    num_lost: int = 0

    def gone(self, living: Collection[str]) -> set[str]:
        """The ids of replicas that will not serve again: those that said so, and those without a process."""
        starts = self.by_replica.items()
        return {replica_id for replica_id, start in starts if start.is_lost or replica_id not in living}
