"""Who is told how far a start has come, and the error of one that failed."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from engine import MemoryUse, NanoserveError


class StartError(NanoserveError):
    """The start failed for a reason that is no setting's fault."""


class Narrator(Protocol):
    """Who tells the user how far the start is."""

    def say(self, line: str) -> None: ...

    def loading(self, done: int, total: int, num_ready: int, num_replicas: int) -> None: ...

    def doing(self, text: str) -> None: ...

    def memory(self, replicas: Mapping[str, Sequence[MemoryUse]]) -> None: ...
