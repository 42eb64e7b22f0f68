"""What the autoscaler's log says of machines that do not join; `ray up` itself shows nothing of them.

It is the output of ssh and of the commands on the workers, among Ray's own lines, which begin with a time.
"""

from pathlib import Path

from cluster.state_directory import ray_directory

RESTARTED = "nanoserve ray start: the autoscaler was started again."
_FAILED = "update-failed"
_SIGNS = ("nanoserve: ", "ssh: ", "rsync error", "bash: ")


def autoscaler_log() -> Path:
    """Of the cluster whose head is this machine."""
    return ray_directory() / "session_latest" / "logs" / "monitor.out"


def current_part(log: Path) -> str:
    """What the autoscaler that runs now has written."""
    try:
        return log.read_text(errors="replace").rpartition(RESTARTED)[2]
    except OSError:
        return ""


def complaints(text: str) -> list[str]:
    """The lines that say why a machine could not be started, each once, in order."""
    lines = [line.strip() for line in text.splitlines()]
    told = [line for line in lines if line.startswith(_SIGNS) or "Permission denied" in line]
    return [
        line for line in dict.fromkeys(told) if "no job control" not in line and "terminal process group" not in line
    ]


def has_given_up(text: str) -> bool:
    """Whether a machine could not be started: Ray does not try one again."""
    return _FAILED in text
