"""The folder of what we keep on a machine of `ray up`: HAProxy's program and sockets, and the data of Prometheus and
Grafana.

Whoever can write there runs programs as its user. So it lies beside Ray's own folder, which Ray opens to everybody, and
not in it; and one that somebody else may have made, or can change, is refused.
"""

import os
import stat
import tempfile
from pathlib import Path

from engine import ConfigError

_LONGEST_PLACE = 8  # HAProxy's sockets lie deep below it, and their paths may have 97 characters
_ELSEWHERE = "or set RAY_TMPDIR to a folder of your own."


def ray_directory() -> Path:
    """Where Ray keeps its sessions, and the list of what Prometheus is to read of it."""
    return _place() / "ray"


def state_directory() -> Path:
    """`/tmp/nanoserve-UID` (`RAY_TMPDIR` in place of /tmp), made unless it is there. Short, since it holds sockets.

    Raises `ConfigError` for one that is not this user's alone.
    """
    directory = _place() / f"nanoserve-{os.getuid()}"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise ConfigError(f"{directory} cannot be made: {error.strerror}. Mend that, {_ELSEWHERE}") from None
    if stat.S_ISLNK(found.st_mode):
        raise ConfigError(f"{directory} is a link, which anybody can lay there: remove it, {_ELSEWHERE}")
    if found.st_uid != os.getuid():
        raise ConfigError(f"{directory} belongs to user {found.st_uid}, not to you: have it removed, {_ELSEWHERE}")
    if found.st_mode & 0o077:
        raise ConfigError(
            f"{directory} is open to other users (mode {stat.S_IMODE(found.st_mode):04o}), who may have put programs "
            f"there: remove it, {_ELSEWHERE}"
        )
    return directory


def session_place() -> Path:
    """Where `nanoserve serve` makes the folder of a private cluster: TMPDIR's, unless its name is too long for that."""
    place = tempfile.gettempdir()
    return Path(place if len(place) <= _LONGEST_PLACE else "/tmp")


def _place() -> Path:
    return Path(os.environ.get("RAY_TMPDIR") or "/tmp")
