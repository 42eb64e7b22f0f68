"""`Finding`: one thing that was looked at: how bad it is, what was found, where, and what to do about it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """WARNING may go well, and ERROR will not."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`check` is the name of the check; what is ok needs no `remedy`, all else has one."""

    check: str
    level: Level
    found: str
    where: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert bool(self.remedy) == (self.level is not Level.OK), self

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "check": self.check,
            "level": self.level.value,
            "found": self.found,
            "where": self.where,
            "remedy": self.remedy,
        }


def ok(check: str, found: str, where: str) -> Finding:
    """Nothing to do."""
    return Finding(check=check, level=Level.OK, found=found, where=where)


def warning(check: str, found: str, where: str, remedy: str) -> Finding:
    """It may go well."""
    return Finding(check=check, level=Level.WARNING, found=found, where=where, remedy=remedy)


def error(check: str, found: str, where: str, remedy: str) -> Finding:
    """It will not go well."""
    return Finding(check=check, level=Level.ERROR, found=found, where=where, remedy=remedy)
