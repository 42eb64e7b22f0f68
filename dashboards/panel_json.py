"""Reads dashboards as Grafana does: the panels of a JSON file, and their queries with variables filled in."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("serving", "cluster", "pipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One query of a panel."""

    ref: str
    expression: str
    legend: str
    is_instant: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel; `json` is all of it."""

    title: str
    kind: str
    targets: tuple[Target, ...]
    json: Mapping[str, Any]

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Unit, thresholds and drawing of its fields."""
        defaults: Mapping[str, Any] = self.json["fieldConfig"]["defaults"]
        return defaults

    @property
    def thresholds(self) -> list[tuple[float | None, str]]:
        """From which value on a colour holds; the first has no value."""
        return [(step["value"], step["color"]) for step in self.defaults["thresholds"]["steps"]]


def file_of(name: str) -> Path:
    """Where the dashboard's JSON is."""
    return Path(__file__).with_name(f"{name}.json")


def load(name: str) -> Any:
    """The dashboard, as Grafana reads it."""
    return json.loads(file_of(name).read_text())


def panels(dashboard: Any) -> Iterator[Panel]:
    """Every panel that asks something, in order."""
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            targets = tuple(
                Target(
                    ref=target["refId"],
                    expression=target["expr"],
                    legend=target.get("legendFormat") or "",
                    is_instant=bool(target.get("instant")),
                )
                for target in panel["targets"]
            )
            yield Panel(title=panel["title"], kind=panel["type"], targets=targets, json=panel)


def filled_in(expression: str, variables: Mapping[str, str]) -> str:
    """The expression with `$name` replaced; raises `KeyError` for a variable that has no value."""
    return re.sub(r"\$(\w+)", lambda match: variables[match[1]], expression)


def legend_of(target: Target, labels: Mapping[str, str]) -> str:
    """The name of a series, as the legend's pattern makes it of its labels."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda match: labels.get(match[1], ""), target.legend)
