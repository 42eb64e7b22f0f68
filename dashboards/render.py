"""Draws a dashboard from its JSON and a Prometheus, where there is no Grafana to look at it with:

    python -m dashboards.render serving --prometheus http://127.0.0.1:9090 --minutes 5 --out docs/images

Asks what Grafana would ask, with its variables at "All". What it draws is plainer, the numbers are the same. The exit
status is 1 if a panel has no data.
"""

import math
import time
from pathlib import Path
from typing import Annotated, Any, Protocol

import matplotlib
import typer
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from dashboards.drawing import GRID, TEXT, Line, draw
from dashboards.panel_json import NAMES, Panel, filled_in, legend_of, load, panels
from dashboards.prometheus import Prometheus, Series

ALL = {"model": ".*", "replica": ".*", "__rate_interval": "20s"}
_INCHES = 15.5
_UNIT = 0.36  # inches of a grid row
_DPI = 100
_MAX_POINTS = 240
_MIN_STEP = 5.0  # seconds: the scrape interval


class Answers(Protocol):
    """What a `Prometheus` is to this module."""

    def instant(self, expression: str, time: float | None = None) -> list[Series]: ...

    def over(self, expression: str, start: float, end: float, step: float) -> list[Series]: ...


def render(dashboard: Any, prometheus: Answers, window: tuple[float, float]) -> tuple[Figure, list[str]]:
    """The picture, and the titles of the panels without data."""
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    grid = dashboard["panels"]
    num_rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in grid) + 1.5
    figure = Figure(figsize=(_INCHES, num_rows * _UNIT), dpi=_DPI, facecolor="#f4f5f7")
    figure.text(0.008, 1 - 0.75 / num_rows, dashboard["title"], fontsize=15, color=TEXT, va="center", fontweight="bold")
    empty = []
    by_id = {panel.json["id"]: panel for panel in panels(dashboard)}
    for json in grid:
        place = json["gridPos"]
        left, width = place["x"] / 24, place["w"] / 24
        top, height = 1 - (place["y"] + 1.5) / num_rows, place["h"] / num_rows
        if json["type"] == "row":
            figure.text(left + 0.008, top - height / 2, json["title"], fontsize=11, color=TEXT, va="center")
            continue
        panel = by_id[json["id"]]
        figure.add_artist(
            FancyBboxPatch(
                (left + 0.004, top - height + 0.1 / num_rows),
                width - 0.008,
                height - 0.2 / num_rows,
                boxstyle="square,pad=0",
                facecolor="white",
                edgecolor=GRID,
                transform=figure.transFigure,
                zorder=-1,
            )
        )
        inside = (left + 0.01, top - height + 0.35 / num_rows, width - 0.02, height - 1.35 / num_rows)
        if not draw(panel, figure.add_axes(inside), lines_of(panel, prometheus, window), window):
            empty.append(panel.title)
    return figure, empty


def lines_of(panel: Panel, prometheus: Answers, window: tuple[float, float]) -> list[Line]:
    """What the panel's queries answer."""
    start, end = window
    step = max(_MIN_STEP, math.ceil((end - start) / _MAX_POINTS))
    lines = []
    for target in panel.targets:
        expression = filled_in(target.expression, ALL)
        is_range = not target.is_instant
        found = prometheus.over(expression, start, end, step) if is_range else prometheus.instant(expression, end)
        if is_range:  # so that a replica has the same colour on every panel, as far as it can be
            found.sort(key=lambda series: legend_of(target, series.labels))
        for series in found:
            times, values = zip(*series.points, strict=True)
            lines.append(Line(legend_of(target, series.labels), target.ref, series.labels, list(times), list(values)))
    return lines


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(NAMES)}; all unless given.")] = None,
    prometheus: Annotated[str, typer.Option(help="Its URL.")] = "http://127.0.0.1:9090",
    minutes: Annotated[float, typer.Option(min=0.1, help="How far to look back.")] = 15.0,
    out: Annotated[Path, typer.Option(file_okay=False, help="Where the pictures go.")] = Path("."),
) -> None:
    """Draw dashboards as dashboard_NAME.png."""
    now = time.time()
    server = Prometheus(prometheus)
    is_whole = True
    for name in names or NAMES:
        figure, empty = render(load(name), server, (now - 60 * minutes, now))
        file = out / f"dashboard_{name}.png"
        figure.savefig(file)
        print(f"{file}" + (f": no data in {', '.join(empty)}" if empty else ""))
        is_whole = is_whole and not empty
    if not is_whole:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
