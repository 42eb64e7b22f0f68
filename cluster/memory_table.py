"""The memory of a replica and its ranks as text: what it consists of, beside what the operating system says."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from engine import MemoryPart, MemoryUse

_MEBIBYTE: Final = 2**20
_NAME_WIDTH: Final = 26
_WIDTH: Final = 10


def memory_tables(replicas: Mapping[str, Sequence[MemoryUse]]) -> Iterator[str]:
    """A table per replica, a column per process, in MiB; nothing for a replica where memory could not be measured."""
    for replica, uses in replicas.items():
        if uses:
            yield "\n".join((f"Memory of replica {replica} in MiB:", *_lines(uses)))


def _lines(uses: Sequence[MemoryUse]) -> Iterator[str]:
    yield _row("", [use.process for use in uses])
    for part in MemoryPart:
        if any(part in use.parts for use in uses):
            yield _row(part.value, [_cell(use.parts.get(part)) for use in uses])
    yield _row("unexplained", [_cell(use.unexplained if use.is_checked else None) for use in uses])
    yield _row("resident (RSS)", [_cell(use.memory.resident) for use in uses])
    yield _row("its share of that (PSS)", [_cell(use.memory.proportional) for use in uses])
    for part in MemoryPart:
        if any(use.device_parts.get(part) for use in uses):
            yield _row(f"on the GPU: {part.value}", [_cell(use.device_parts.get(part)) for use in uses])
    caches = [
        (use.parts.get(MemoryPart.KV_CACHE, 0) + use.device_parts.get(MemoryPart.KV_CACHE, 0), use.cache_budget)
        for use in uses
        if use.cache_budget is not None
    ]
    if caches:
        taken, allowed = max(caches, key=lambda cache: cache[0])
        assert allowed is not None
        yield f"The KV cache of a rank takes {_cell(taken)} of the {_cell(allowed)} MiB it is allowed."


def _row(name: str, cells: Sequence[str]) -> str:
    return f"  {name:<{_NAME_WIDTH}}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells)


def _cell(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / _MEBIBYTE:,.1f}"
