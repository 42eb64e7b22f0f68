"""`LaunchFile`: what nanoserve needs to know of a cluster file of `ray up`, or of the copy `ray up` leaves on the head.

Ray validates such files itself, and late; here is only what our own commands act on. Nothing is contacted.
"""

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from engine import ConfigError

LOCAL = "local"
_DEPLOY = re.compile(r"nanoserve\s+deploy\s+(.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchFile:
    """One cluster. Addresses and the key are known for the local provider only, where machines exist beforehand."""

    path: Path
    provider: str
    head_ip: str = ""
    head_reached_at: str = ""  # from outside the cluster's network
    worker_ips: tuple[str, ...] = ()
    ssh_user: str = ""
    ssh_key: Path | None = None
    min_workers: int = 0
    code: str = ""  # where the project lies on every machine
    recipe: str = ""  # what `nanoserve deploy` is given there

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises `ConfigError`."""
        try:
            values = yaml.safe_load(path.expanduser().read_text())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}.") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from None
        provider = _mapping(values, "provider", path)
        kind = str(provider.get("type", ""))
        if kind != LOCAL:
            return cls(path=path, provider=kind, min_workers=_min_workers(values), recipe=_recipe(values))
        head_ip, worker_ips = provider.get("head_ip"), provider.get("worker_ips")
        if not isinstance(head_ip, str) or not isinstance(worker_ips, list):
            raise ConfigError(
                f"{path}: provider: needs head_ip (an address) and worker_ips (a list, [] for one machine)."
            )
        workers = tuple(map(str, worker_ips))
        if workers and is_loopback(head_ip):
            raise ConfigError(
                f"{path}: provider.head_ip: {head_ip} means each worker itself to the workers ({', '.join(workers)}): "
                "write the address under which they reach the head."
            )
        if head_ip in workers or len(set(workers)) < len(workers):
            raise ConfigError(f"{path}: provider: a machine is named twice among head_ip and worker_ips.")
        auth = _mapping(values, "auth", path)
        key = auth.get("ssh_private_key")
        return cls(
            path=path,
            provider=kind,
            head_ip=head_ip,
            head_reached_at=provider.get("external_head_ip") or head_ip,
            worker_ips=workers,
            ssh_user=str(auth.get("ssh_user", "")),
            ssh_key=None if key is None else Path(os.path.expanduser(key)),
            min_workers=min(len(workers), _min_workers(values, default=len(workers))),
            code=_code(values),
            recipe=_recipe(values),
        )

    @property
    def machines(self) -> tuple[str, ...]:
        """Where ssh reaches each, the head first."""
        return (self.head_reached_at, *self.worker_ips)


def is_loopback(address: str) -> bool:
    """Whether only the machine itself can mean itself by `address`."""
    return address == "localhost" or address.startswith("127.") or address == "::1"


def _mapping(values: Any, key: str, path: Path) -> Mapping[str, Any]:
    value = values.get(key) if isinstance(values, dict) else None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: the key {key!r} is missing: is this a cluster file of `ray up`?")
    return value


def _min_workers(values: Mapping[str, Any], default: int = 0) -> int:
    """Before `ray up` of the local provider a key of the file itself, afterwards and elsewhere of each kind of node."""
    kinds = values.get("available_node_types")
    if isinstance(kinds, dict):
        return sum(int(kind.get("min_workers", 0)) for kind in kinds.values())
    return int(values.get("min_workers", default))


def _recipe(values: Mapping[str, Any]) -> str:
    """The first argument of `nanoserve deploy` among the head's start commands."""
    for command in values.get("head_start_ray_commands") or ():
        if (found := _DEPLOY.search(str(command))) is not None:
            arguments = [word for word in shlex.split(found[1]) if not word.startswith("-")]
            return arguments[0] if arguments else ""
    return ""


def _code(values: Mapping[str, Any]) -> str:
    """The folder that the package `cluster` is copied into."""
    for remote in values.get("file_mounts") or ():
        folder, _, name = str(remote).rstrip("/").rpartition("/")
        if name == "cluster":
            return folder
    return ""
