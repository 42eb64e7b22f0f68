"""`CompileLog`: how many specialisations of Triton's kernels a process compiled, and how long that took.

Triton tells a listener of every specialisation that it compiles or finds in its cache on disk; of those that the
process has already, it tells nothing.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gpu_parts.ledger import Ledger, Row


@dataclass(slots=True)
class CompileLog:
    """`num_compiled` specialisations in `seconds` (of all threads together), by the names of their kernels; `num_found`
    others were in the cache.
    """

    num_compiled: int = 0
    num_found: int = 0
    seconds: float = 0.0
    kernels: Counter[str] = field(default_factory=Counter)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Count what is compiled inside; whoever listened before does so again afterwards."""
        from triton import knobs

        before = knobs.compilation.listener
        knobs.compilation.listener = self._hear
        try:
            yield
        finally:
            knobs.compilation.listener = before

    def _hear(self, *, src: Any, times: Any, cache_hit: bool, **others: Any) -> None:
        if cache_hit:
            self.num_found += 1
            return
        self.num_compiled += 1
        self.seconds += times.total / 1e6  # given in microseconds
        self.kernels[str(getattr(src, "name", "unknown"))] += 1

    def row(self, name: str) -> Row:
        """Seconds of compiling, and of how many."""
        note = f"{self.num_compiled} specialisations of {len(self.kernels)} kernels compiled, {self.num_found} found"
        return Row(group="compiled", name=name, value=self.seconds, unit="s", note=note, details=dict(self.kernels))


@contextlib.contextmanager
def compiled_in(ledger: Ledger, name: str) -> Iterator[CompileLog]:
    """A log of what is compiled inside, which becomes a row at the end, however that comes."""
    log = CompileLog()
    try:
        with log.listening():
            yield log
    finally:
        ledger.add(log.row(name))
