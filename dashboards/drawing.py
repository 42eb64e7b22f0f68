"""Draws the panels of a dashboard with matplotlib, one function per kind of panel. Knows series, not their source.

A panel's area is a pair of axes without a frame; what a kind needs is placed inside. Colours are Grafana's classic.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dashboards.panel_json import Panel
from dashboards.units import formatted

PALETTE = [
    *("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#705da0"),
    *("#508642", "#cca300", "#447ebc", "#c15c17", "#890f02", "#0a437c", "#6d1f62", "#584477"),
]
NAMED = {"green": "#3f9142", "orange": "#f2871b", "red": "#d43b3b", "blue": "#3b78c2"}
TEXT, QUIET, GRID = "#24292e", "#6a737d", "#e1e4e8"
_LEGEND_ROWS = 3


@dataclass(frozen=True, slots=True)
class Line:
    """A series with its name: times in Unix seconds, and values, which may be NaN. `ref` is its query's letter."""

    name: str
    ref: str
    labels: Mapping[str, str]
    times: list[float]
    values: list[float]

    @property
    def last(self) -> float:
        """The newest value that is a number; NaN without any."""
        return next((value for value in reversed(self.values) if math.isfinite(value)), math.nan)


def draw(panel: Panel, area: Axes, lines: Sequence[Line], window: tuple[float, float]) -> bool:
    """Draw one panel into `area`; whether it shows anything. Raises `KeyError` for a kind of panel nobody draws."""
    area.set_axis_off()
    area.set_title(panel.title, loc="left", fontsize=9.5, fontweight="bold", color=TEXT, pad=4)
    shown = [line for line in lines if math.isfinite(line.last)]
    if not shown:
        area.text(0.5, 0.5, "No data", ha="center", va="center", color=QUIET, fontsize=12, transform=area.transAxes)
        return False
    kinds = {"timeseries": _curves, "stat": _number, "bargauge": _bars, "heatmap": _heat, "table": _table}
    kinds[panel.kind](panel, area, shown, window)
    return True


def _inner(area: Axes, left: float, bottom: float, right: float, top: float) -> Axes:
    inner = area.inset_axes((left, bottom, right - left, top - bottom))
    inner.tick_params(labelsize=7.5, colors=QUIET, length=0)
    for side in inner.spines.values():
        side.set_visible(False)
    return inner


def _curves(panel: Panel, area: Axes, lines: Sequence[Line], window: tuple[float, float]) -> None:
    custom = panel.defaults["custom"]
    columns = _legend_columns([line.name for line in lines], panel.json["gridPos"]["w"])
    num_rows = min(_LEGEND_ROWS, math.ceil(len(lines) / columns))
    axes = _inner(area, 0.9 / panel.json["gridPos"]["w"], 0.1 + 0.075 * num_rows, 0.99, 0.98)
    colors = _colors(panel, lines)
    if custom.get("stacking", {}).get("mode") == "normal":
        times = np.array(sorted({time for line in lines for time in line.times}))
        layers = np.array([_aligned(line, times) for line in lines])
        axes.stackplot(times, layers, colors=colors, alpha=0.75, linewidth=0, labels=[line.name for line in lines])
        highest = float(layers.clip(0).sum(axis=0).max())
    else:
        for line, color in zip(lines, colors, strict=True):
            dash = custom.get("lineStyle") or _override(panel, line.name, "custom.lineStyle")
            style = "--" if dash else "-"
            axes.plot(line.times, line.values, style, color=color, linewidth=1.3, label=line.name)
        highest = max(value for line in lines for value in line.values if math.isfinite(value))
    _scale(panel, axes, lines, highest)
    _time_axis(axes, window)
    handles, names = axes.get_legend_handles_labels()
    legend = area.legend(
        handles[: columns * _LEGEND_ROWS],
        names[: columns * _LEGEND_ROWS],
        loc="lower left",
        bbox_to_anchor=(-0.01, -0.06),
        ncol=columns,
        fontsize=7.5,
        frameon=False,
        handlelength=1.2,
        columnspacing=1.2,
        labelcolor=TEXT,
    )
    legend.set_zorder(5)


def _scale(panel: Panel, axes: Axes, lines: Sequence[Line], highest: float) -> None:
    lowest = min(0.0, *(value for line in lines for value in line.values if math.isfinite(value)))
    top = panel.defaults.get("max") or max(highest * 1.08, lowest + 1e-9)
    if highest <= 0 and not panel.defaults.get("max"):
        top = 1.0
    thresholds = panel.thresholds[1:] if "thresholdsStyle" in panel.defaults["custom"] else []
    for value, color in thresholds:
        if value is not None and value <= top:
            axes.axhline(value, color=NAMED[color], linewidth=0.8, linestyle=(0, (5, 4)), alpha=0.7)
    axes.set_ylim(lowest, top)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    unit = panel.defaults["unit"]
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(value, unit)))
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _time_axis(axes: Axes, window: tuple[float, float]) -> None:
    start, end = window
    axes.set_xlim(start, end)
    step = next((step for step in (15, 30, 60, 120, 300, 900, 3600) if (end - start) / step <= 6), 7200)
    axes.set_xticks(np.arange(math.ceil(start / step) * step, end, step))
    pattern = "%H:%M:%S" if step < 60 else "%H:%M"
    axes.xaxis.set_major_formatter(FuncFormatter(lambda time, _: datetime.fromtimestamp(time, UTC).strftime(pattern)))


def _number(panel: Panel, area: Axes, lines: Sequence[Line], window: tuple[float, float]) -> None:
    line = lines[0]
    color = _color_at(panel, line.last)
    curve = _inner(area, 0.0, 0.0, 1.0, 0.45)
    curve.set_axis_off()
    curve.fill_between(line.times, line.values, color=color, alpha=0.18, linewidth=0)
    curve.plot(line.times, line.values, color=color, linewidth=1)
    curve.set_xlim(*window)
    curve.set_ylim(0, max(1e-9, *(value for value in line.values if math.isfinite(value))) * 1.1)
    text = formatted(line.last, panel.defaults["unit"], panel.defaults.get("decimals"))
    area.text(0.5, 0.66, text, ha="center", va="center", fontsize=19, color=color, fontweight="bold")


def _bars(panel: Panel, area: Axes, lines: Sequence[Line], window: tuple[float, float]) -> None:
    axes = _inner(area, 0.36, 0.02, 0.86, 0.98)
    axes.set_xticks([])
    values = [line.last for line in lines]
    places = range(len(lines))
    axes.barh(places, [max(values)] * len(lines), color=GRID, height=0.62)
    axes.barh(places, values, color=[_color_at(panel, value) for value in values], height=0.62)
    axes.set_yticks(places, [line.name for line in lines])
    axes.set_ylim(max(len(lines), 4) - 0.4, -0.6)
    axes.tick_params(axis="y", labelsize=8.5, colors=TEXT)
    for place, value in zip(places, values, strict=True):
        text = formatted(value, panel.defaults["unit"])
        axes.text(max(values) * 1.02, place, text, va="center", fontsize=8.5, color=TEXT)


def _heat(panel: Panel, area: Axes, lines: Sequence[Line], window: tuple[float, float]) -> None:
    axes = _inner(area, 0.11, 0.17, 0.99, 0.98)
    buckets = sorted(lines, key=lambda line: float(line.labels["le"]))
    times = np.array(sorted({time for line in buckets for time in line.times}))
    cumulative = np.array([_aligned(line, times) for line in buckets])
    counts = np.diff(cumulative, axis=0, prepend=0).clip(0)
    used = np.flatnonzero(counts.sum(axis=1))
    first, last = (max(0, used[0] - 1), min(len(buckets) - 1, used[-1] + 1)) if len(used) else (0, len(buckets) - 1)
    shown = np.where(counts[first : last + 1] > 0, counts[first : last + 1], np.nan)
    width = times[1] - times[0] if len(times) > 1 else 1
    edges = np.append(times - width / 2, times[-1] + width / 2)
    axes.pcolormesh(edges, np.arange(len(shown) + 1), shown, cmap="YlOrRd", vmin=0)
    unit = panel.json["options"]["yAxis"]["unit"]
    names = ["more" if line.labels["le"] == "+Inf" else formatted(float(line.labels["le"]), unit) for line in buckets]
    axes.set_yticks(np.arange(1, len(shown) + 1), names[first : last + 1])
    axes.grid(axis="y", color=GRID, linewidth=0.5)
    _time_axis(axes, window)


def _table(panel: Panel, area: Axes, lines: Sequence[Line], window: tuple[float, float]) -> None:
    organize = next(step["options"] for step in panel.json["transformations"] if step["id"] == "organize")
    key, *columns = sorted(organize["renameByName"].items(), key=lambda item: organize["indexByName"][item[0]])
    keys = sorted({line.labels[key[0]] for line in lines})
    by_cell = {(line.labels[key[0]], line.ref): line.last for line in lines}
    places = [0.0, *(0.17 + 0.83 * (index + 1) / len(columns) for index in range(len(columns)))]
    height = 1 / (max(len(keys), 5) + 1)
    for place, (_, title) in zip(places, (key, *columns), strict=True):
        align = "left" if place == 0 else "right"
        area.text(place, 1 - height / 2, title, ha=align, va="center", fontsize=9, color=QUIET, fontweight="bold")
    for row, replica in enumerate(keys, start=1):
        center = 1 - height * (row + 0.5)
        area.axhline(1 - height * row, color=GRID, linewidth=0.8)
        area.text(0, center, replica, va="center", fontsize=10, color=TEXT)
        for place, (column, title) in zip(places[1:], columns, strict=True):
            value = by_cell.get((replica, column.removeprefix("Value #")), math.nan)
            unit = _override(panel, title, "unit")
            text = formatted(value, unit) if math.isfinite(value) else "-"
            color = _color_in(_override(panel, title, "thresholds"), value)
            area.text(place, center, text, ha="right", va="center", fontsize=10, color=color)
    area.set_xlim(0, 1)
    area.set_ylim(0, 1)


def _aligned(line: Line, times: np.ndarray) -> list[float]:
    """The values at `times`, 0 where the series has none."""
    values = dict(zip(line.times, line.values, strict=True))
    found = [values.get(time, 0.0) for time in times.tolist()]
    return [value if math.isfinite(value) else 0.0 for value in found]


def _legend_columns(names: Sequence[str], width: int) -> int:
    longest = max(map(len, names))
    return max(1, min(len(names), 9 * width // (longest + 5)))


def _colors(panel: Panel, lines: Sequence[Line]) -> list[str]:
    colors = []
    for index, line in enumerate(lines):
        fixed = _override(panel, line.name, "color")
        colors.append(NAMED[fixed["fixedColor"]] if fixed else PALETTE[index % len(PALETTE)])
    return colors


def _override(panel: Panel, name: str, field: str) -> Any:
    """What a panel says of one of its series alone, or None."""
    for override in panel.json["fieldConfig"]["overrides"]:
        if override["matcher"] == {"id": "byName", "options": name}:
            for entry in override["properties"]:
                if entry["id"] == field:
                    return entry["value"]
    return None


def _color_at(panel: Panel, value: float) -> str:
    return _color_in(panel.defaults["thresholds"], value)


def _color_in(thresholds: Mapping[str, Any] | None, value: float) -> str:
    """The colour of the highest threshold that the value has reached."""
    color = TEXT
    for step in thresholds["steps"] if thresholds else ():
        if step["value"] is None or value >= step["value"]:
            color = NAMED[step["color"]]
    return color
