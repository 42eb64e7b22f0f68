"""`MemoryUse`: what the resident memory of one process of a served model consists of, and how much nobody can explain.

Weights, the KV cache and tables are counted from their shapes; libraries, compiled kernels and the workspace of steps
are measured on the way (`MemoryMeter`). What the operating system says is resident is measured at the end, apart from
all of them: the difference is printed, not hidden. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from engine.host_memory import ResidentMemory, resident_file_bytes, resident_memory

_KERNEL_PATH = "aotinductor"  # in the path of every library that torch unpacks and loads for a compiled kernel


class MemoryPart(StrEnum):
    """One kind of resident memory of a process on the host."""

    LIBRARIES = "interpreter and libraries"
    WEIGHTS = "weights"
    KV_CACHE = "KV cache"
    TABLES = "row tables, rotary table"
    KERNELS = "compiled kernels"
    WORKSPACE = "workspace of steps"
    CONTROL = "engine and connections"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Of `process` (such as "rank 0") with this `pid`, in bytes. `device_parts` lie on its GPU and are not resident.

    `cache_budget` is what the KV cache was allowed, None for a process without one.
    """

    process: str
    pid: int
    parts: Mapping[MemoryPart, int]
    memory: ResidentMemory
    device_parts: Mapping[MemoryPart, int] = field(default_factory=dict)
    cache_budget: int | None = None

    @property
    def explained(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())

    @property
    def is_checked(self) -> bool:
        """Whether `unexplained` can differ from 0: `CONTROL` is all that its process grew by, and leaves nothing."""
        return MemoryPart.CONTROL not in self.parts

    @property
    def unexplained(self) -> int:
        """Resident, and none of the parts; negative where parts are not resident in full."""
        return self.memory.resident - self.explained


class MemoryMeter:
    """Watches this process's own memory through its start. Made when its libraries are loaded and nothing else is.

    Without /proc nothing can be measured and `use` returns None.
    """

    def __init__(self) -> None:
        self._before = resident_memory()
        self._mark = self._before

    def mark(self) -> None:
        """From here on the process fills `grown`."""
        self._mark = resident_memory()

    def grown(self) -> int:
        """Bytes that the process has written since `mark` and still holds."""
        now = resident_memory()
        return 0 if now is None or self._mark is None else max(0, now.anonymous - self._mark.anonymous)

    def use(
        self,
        process: str,
        pid: int,
        parts: Mapping[MemoryPart, int],
        *,
        device_parts: Mapping[MemoryPart, int] | None = None,
        cache_budget: int | None = None,
    ) -> MemoryUse | None:
        """The use now, of these parts and of libraries and kernels, whose pages are those of files."""
        now = resident_memory()
        if now is None or self._before is None:
            return None
        kernels = resident_file_bytes(lambda path: _KERNEL_PATH in path)
        measured = {
            MemoryPart.LIBRARIES: self._before.anonymous + now.resident - now.anonymous - kernels,
            MemoryPart.KERNELS: kernels,
        }
        return MemoryUse(
            process=process,
            pid=pid,
            parts={part: num_bytes for part in MemoryPart if (num_bytes := {**measured, **parts}.get(part))},
            memory=now,
            device_parts=device_parts or {},
            cache_budget=cache_budget,
        )
