"""`ReplicaStart`: how far a replica's start has come. Who writes and reads it is `cluster.startup`'s business."""

from dataclasses import dataclass

from engine import MemoryUse


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStart:
    """A replica's state: bytes of weights read so far, when it was ready, or what stopped it.

    `doing` is what its ranks were busy with last, in words; `memory` what its processes hold, once it is ready. Times
    are Unix seconds.
    """

    begun_at: float = 0.0
    done: int = 0
    total: int = 0
    doing: str = ""
    memory: tuple[MemoryUse, ...] = ()
    ready_at: float | None = None
    error: Exception | None = None
