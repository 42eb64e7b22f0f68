"""`Results`: what the parts of a run leave behind, in two files: everything measured, and the table.

Parts write a file each, in a folder that goes with the run; from these both files are made anew, as a whole, again and
again: whatever ends the run, they hold what there was. No figure of an earlier run stays.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_parts.ledger import Row, rows_of
from gpu_parts.part import Part

MEASURED, TABLE, PROFILES = "measured.json", "table.txt", "profile-*.json"


class Results:
    """`inside` is where parts write, `folder` where the results go; None keeps none."""

    def __init__(self, inside: Path, folder: Path | None, parts: Sequence[Part]) -> None:
        self.inside = inside
        self.parts = parts
        self._folder = folder
        inside.mkdir(parents=True)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            profiles = folder.glob(PROFILES) if Part.PROFILE in parts else ()
            for path in (folder / MEASURED, folder / TABLE, *profiles):
                path.unlink(missing_ok=True)

    def gather(self, seconds: float | None = None) -> str:
        """Bring the files up to date and return the table; `seconds` is how long the run took so far."""
        table = "\n".join(self._table(seconds))
        if self._folder is not None:
            parts = {part.value: self._content(part) for part in self.parts}
            _replace(self._folder / MEASURED, json.dumps({"parts": parts}, indent=1) + "\n")
            _replace(self._folder / TABLE, table + "\n")
            for path in self.inside.glob(PROFILES):
                shutil.copyfile(path, self._folder / path.name)
        return table

    def note_end(self, part: Part, reason: str) -> None:
        """Add a row that says why a part did not come to its end."""
        content = self._content(part) or {"part": part.value, "is_complete": False, "rows": []}
        row = Row(group="ended", name=part.value, is_right=False, note=reason)
        content["rows"].append(asdict(row))
        _replace(self.inside / f"{part.value}.json", json.dumps(content, indent=1) + "\n")

    def _content(self, part: Part) -> dict[str, Any] | None:
        path = self.inside / f"{part.value}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def _table(self, seconds: float | None) -> list[str]:
        """Every row that is shown, part by part, and a verdict."""
        lines: list[str] = []
        num_wrong = num_missing = 0
        for part in self.parts:
            rows, is_complete = rows_of(self.inside / f"{part.value}.json")
            lines += ["", f"{part.value}{'' if is_complete else ' (NOT COMPLETE)'}"]
            lines += [row.line() for row in rows if row.is_shown]
            num_wrong += sum(row.is_right is False and row.group != "ended" for row in rows)
            num_missing += not is_complete
        verdict = f"{num_wrong} WRONG" if num_wrong else "everything checked is right"
        missing = f", {num_missing} parts NOT COMPLETE" if num_missing else ""
        return [*lines, "", verdict + missing + ("" if seconds is None else f"; {seconds:.0f} s")]


def _replace(path: Path, text: str) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    beside.replace(path)
