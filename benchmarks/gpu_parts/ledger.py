"""`Ledger`: the rows of one part, printed as they are measured and kept in a file that is whole after every row.

A process that is ended loses nothing that it had measured. The file is begun anew by every run: no figure of an earlier
one can be taken for a new one.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table. `value` is None where nothing was measured, and `note` says why; `details` go to the file.

    `ceiling` is in the unit of `value`, the largest that the device was seen to give in this run. `is_right` is None
    for what is a figure and no check. Rows that are not `is_shown` are in the file only.
    """

    group: str
    name: str
    value: float | None = None
    unit: str = ""
    ceiling: float | None = None
    is_right: bool | None = None
    note: str = ""
    is_shown: bool = True
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def percent(self) -> float | None:
        """Of the ceiling."""
        return None if self.value is None or not self.ceiling else 100 * self.value / self.ceiling

    def line(self) -> str:
        """Aligned with all others: group, name, figure, unit, percent of the ceiling, verdict, note."""
        percent = self.percent
        verdict = "" if self.is_right is None else "ok" if self.is_right else "WRONG"
        return (
            f"{self.group:<16} {self.name:<60} {figure(self.value):>10} {self.unit:<8} "
            f"{'' if percent is None else f'{percent:5.1f} %':>8} {verdict:<5} {self.note}"
        ).rstrip()


def figure(value: float | None) -> str:
    """Four digits or so, whatever the size."""
    if value is None:
        return "-"
    if value and (abs(value) < 0.01 or abs(value) >= 1e7):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class Ledger:
    """`part` names the file, `part`.json in `folder`; `heading` (device, versions, date) begins it."""

    def __init__(self, part: str, folder: Path, heading: dict[str, Any], *, quiet: bool = False) -> None:
        self.part = part
        self.rows: list[Row] = []
        self.heading = heading
        self.logs: dict[str, list[dict[str, float]]] = {}  # what is recorded all the time, by name
        self._path = folder / f"{part}.json"
        self._is_quiet = quiet
        self._saved_at = 0.0
        self.save()

    @property
    def is_right(self) -> bool:
        """Whether no check failed."""
        return all(row.is_right is not False for row in self.rows)

    def add(self, row: Row) -> None:
        """Print it and write the file, every second at most."""
        self.rows.append(row)
        if row.is_shown and not self._is_quiet:
            print(row.line(), flush=True)
        if time.monotonic() - self._saved_at > 1:
            self.save()

    def skip(self, group: str, name: str, reason: str) -> None:
        """A row for what was not measured."""
        self.add(Row(group=group, name=name, note=reason))

    def save(self, *, is_complete: bool = False) -> None:
        """Replace the file as a whole."""
        content = {"part": self.part, **self.heading, "is_complete": is_complete}
        content |= self.logs
        content["rows"] = [asdict(row) | {"percent": row.percent} for row in self.rows]
        beside = self._path.with_suffix(".tmp")
        beside.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(beside, self._path)
        self._saved_at = time.monotonic()


def rows_of(path: Path) -> tuple[list[Row], bool]:
    """The rows of a file that a part has left, and whether it came to its end; none where there is no file."""
    if not path.is_file():
        return [], False
    content = json.loads(path.read_text())
    fields = set(Row.__dataclass_fields__)
    rows = [Row(**{name: value for name, value in row.items() if name in fields}) for row in content["rows"]]
    return rows, bool(content["is_complete"])
