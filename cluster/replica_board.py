"""`ReplicaBoard`: which replicas Serve says are running, from the router that learns it to the ingress that uses it.

Serve makes the router itself, from a class path and JSON, inside the ingress's process; so the two meet under a name.
A module of its own, because Serve pickles the router's module by value, state and all.
"""

from collections.abc import Callable
from typing import ClassVar


class ReplicaGoneError(Exception):
    """The replica that a call was meant for does not exist any more."""


class ReplicaBoard:
    """The replicas that Serve says are running, for one listener. Everything happens on the process's event loop."""

    _boards: ClassVar[dict[str, "ReplicaBoard"]] = {}

    def __init__(self) -> None:
        self.replica_ids: frozenset[str] = frozenset()
        self._listener: Callable[[frozenset[str]], None] | None = None

    @classmethod
    def named(cls, name: str) -> "ReplicaBoard":
        """The board of this process that goes by `name`."""
        return cls._boards.setdefault(name, cls())

    def listen(self, listener: Callable[[frozenset[str]], None]) -> None:
        """Call `listener` now and at every change."""
        self._listener = listener
        listener(self.replica_ids)

    def publish(self, replica_ids: frozenset[str]) -> None:
        """Replicas came or went."""
        if replica_ids != self.replica_ids:
            self.replica_ids = replica_ids
            if self._listener is not None:
                self._listener(replica_ids)
