"""The token that every caller of a Ray cluster must know (RAY_AUTH_MODE=token): found where Ray looks, or made once.

A machine that joins needs the head's; `ray_cluster.yaml` has it copied there over ssh.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from engine import ConfigError

_VALUE, _FILE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def token_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Where Ray reads it from unless RAY_AUTH_TOKEN holds it."""
    home = Path(environment.get("HOME") or Path.home())
    return Path(environment.get(_FILE) or home / ".ray" / "auth_token").expanduser()


def has_token(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a process with these variables has one to show."""
    path = token_file(environment)
    return bool(environment.get(_VALUE)) or (path.is_file() and bool(path.read_text().strip()))


def make_token(environment: Mapping[str, str] = os.environ) -> None:
    """Write a new token unless there is one; nobody but its owner may read the file."""
    if environment.get(_VALUE):
        return
    path = token_file(environment)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        path.chmod(0o600)
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def require_token(environment: Mapping[str, str] = os.environ) -> None:
    """Raise `ConfigError` where there is none."""
    if has_token(environment):
        return
    raise ConfigError(
        f"{token_file(environment)} has no token of the Ray cluster to join. Copy the head's file there (mode 0600); "
        "ray_cluster.yaml does so by `cluster_synced_files`."
    )
