"""`RankFolder`: where the ranks of one group find their engine's socket and meters; it ends with its owner.

A replica that is killed leaves its folder behind. So each is locked as long as its owner lives, and who makes the next
one on the machine removes those that nobody holds.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "nanoserve-ranks-"


class RankFolder:
    """Made where temporary files go; `path` is this user's alone."""

    def __init__(self) -> None:
        """Raises `OSError` where there is no room."""
        place = Path(tempfile.gettempdir())
        for left in place.glob(f"{_PREFIX}*"):
            _remove_unless_held(left)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Once, at the end."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_unless_held(path: Path) -> None:
    with contextlib.suppress(OSError):  # another user's, or gone already
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            if os.fstat(lock).st_uid == os.getuid() and any(path.iterdir()):  # an empty one is just being made
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
