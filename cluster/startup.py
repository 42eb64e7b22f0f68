"""How far each replica's start has come, through Ray's own key-value store: no extra process, any node.

A replica writes (`StartupReport`), `nanoserve serve` and the ingresses read (`read_reports`). Serve itself only says
"deploying". There are as many reports as replicas: one that leaves in order takes its own with it, and who begins
removes those of replicas that came to another end, and counts them.
"""

import pickle
import time
from dataclasses import replace
from typing import Any

import ray
from ray.experimental import internal_kv

from cluster.replica_start import ReplicaStart, ReplicaStarts
from engine import MemoryUse

_NAMESPACE = "nanoserve"
_PREFIX = "startup/"
_NUM_LOST = b"replicas lost"
_MIN_SECONDS = 0.1


class StartupReport:
    """The writing side, in the replica's process."""

    def __init__(self, replica_id: str) -> None:
        self._key = _key(replica_id)
        self._state = ReplicaStart(begun_at=time.time())
        self._last_write = 0.0
        earlier = read_reports()
        lost = earlier.gone(_living_replicas())
        if lost:
            _put(_NUM_LOST, earlier.num_lost + len(lost))
        for gone_id in lost:  # now that they are counted: who begins at the same time counts the same ones
            _remove(_key(gone_id))
        self._write(self._state)

    def progress(self, done: int, total: int) -> None:
        """Weights are being read; may be called often, from any thread."""
        now = time.monotonic()
        if done == total or now - self._last_write > _MIN_SECONDS:
            self._last_write = now
            self._write(replace(self._state, done=done, total=total))

    def doing(self, text: str) -> None:
        """The ranks begin something that may take long."""
        self._write(replace(self._state, doing=text))

    def failed(self, error: Exception) -> None:
        """The replica cannot start."""
        self._write(replace(self._state, error=error))

    def ready(self, now: float, memory: tuple[MemoryUse, ...] = ()) -> None:
        """The replica serves, since `now` (Unix seconds)."""
        self._write(replace(self._state, ready_at=now, memory=memory))

    def lost(self) -> None:
        """The replica served, and cannot any more."""
        if not self._state.is_lost:
            self._write(replace(self._state, is_lost=True))

    def withdraw(self) -> None:
        """The replica leaves in order."""
        _remove(self._key)

    def _write(self, state: ReplicaStart) -> None:
        self._state = state
        _put(self._key, state)


def read_reports() -> ReplicaStarts:
    """The state of every replica that lives, and of those that have ended since the last one began."""
    num_lost = _get(_NUM_LOST) or 0  # first: who begins meanwhile adds to it the lost ones that are read below
    keys = internal_kv._internal_kv_list(_PREFIX, namespace=_NAMESPACE)
    states = {key.decode().removeprefix(_PREFIX): _get(key) for key in keys}
    known = {replica_id: state for replica_id, state in states.items() if state is not None}
    return ReplicaStarts(by_replica=known, num_lost=num_lost)


def clear_reports() -> None:
    """Forget the replicas of earlier applications on this cluster."""
    for key in internal_kv._internal_kv_list(_PREFIX, namespace=_NAMESPACE):
        _remove(key)
    _remove(_NUM_LOST)


def _living_replicas() -> set[str]:
    """The ids of Serve's replicas that have a process: Serve names these SERVE_REPLICA::application#deployment#id."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"].rpartition("#")[2] for actor in actors}


def _key(replica_id: str) -> bytes:
    return (_PREFIX + replica_id).encode()


def _put(key: bytes, value: object) -> None:
    internal_kv._internal_kv_put(key, pickle.dumps(value), overwrite=True, namespace=_NAMESPACE)


def _get(key: bytes) -> Any:
    value = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    return None if value is None else pickle.loads(value)


def _remove(key: bytes) -> None:
    internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
