"""The kinds of panels of the dashboards, each with what no panel may lack: title, description, unit, thresholds.

A thin layer over grafana-foundation-sdk, so that a dashboard reads as a list of what it shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import table as tables
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    GraphTresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

GOOD, WARN, BAD, CALM = "green", "orange", "red", "blue"
OBJECTIVE = "objective"  # the legend of a line that the others should stay below
NEUTRAL = ((None, CALM),)
Steps = tuple[tuple[float | None, str], ...]
DATASOURCE = DataSourceRef(type_val="prometheus", uid="$datasource")
_HEIGHT = 8
_STAT_HEIGHT = 4
_TABLE_HEIGHT = 6


@dataclass(frozen=True, slots=True)
class Query:
    """An expression and the name of its series; `{{label}}` stands for a label's value."""

    expression: str
    legend: str = ""


def lower_is_better(warn: float, bad: float) -> Steps:
    """Thresholds for what should stay small."""
    return ((None, GOOD), (warn, WARN), (bad, BAD))


def higher_is_better(bad: float, good: float) -> Steps:
    """Thresholds for what should be large."""
    return ((None, BAD), (bad, WARN), (good, GOOD))


def graph(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    span: int = 8,
    steps: Steps = NEUTRAL,
    stacked: bool = False,
    maximum: float | None = None,
) -> timeseries.Panel:
    """Lines over time from 0 up; areas on top of each other if `stacked`. Thresholds other than NEUTRAL are drawn."""
    panel = timeseries.Panel().height(_HEIGHT).min(0).line_width(1).fill_opacity(60 if stacked else 8)
    _describe(panel, title, description, unit, steps, span)
    _ask(panel, queries)
    panel.legend(_legend()).tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    if steps != NEUTRAL:
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED))
    if maximum is not None:
        panel.max(maximum)
    if any(query.legend == OBJECTIVE for query in queries):
        line = {"fill": "dash", "dash": [8, 6]}
        color = {"mode": FieldColorModeId.FIXED.value, "fixedColor": BAD}
        panel.override_by_name(OBJECTIVE, _properties({"custom.lineStyle": line, "color": color}))
    return panel


def number(
    title: str, description: str, unit: str, query: str, *, span: int = 4, steps: Steps = NEUTRAL, decimals: int = 1
) -> stat.Panel:
    """One number, the last, over a small curve."""
    panel = stat.Panel().height(_STAT_HEIGHT).decimals(decimals)
    _describe(panel, title, description, unit, steps, span)
    _ask(panel, [Query(query, title)])
    panel.graph_mode(BigValueGraphMode.AREA).color_mode(BigValueColorMode.VALUE)
    return panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))


def bars(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    span: int = 8,
    steps: Steps = NEUTRAL,
    height: int = _HEIGHT,
) -> bargauge.Panel:
    """One horizontal bar per series, as it is now."""
    panel = bargauge.Panel().height(height).min(0).orientation(VizOrientation.HORIZONTAL)
    _describe(panel, title, description, unit, steps, span)
    _ask(panel, queries, is_instant=True)
    return panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))


def heat(title: str, description: str, unit: str, query: str, *, span: int = 8) -> heatmap.Panel:
    """How many observations fell into each bucket, over time; `query` gives the buckets of a histogram by `le`."""
    panel = heatmap.Panel().height(_HEIGHT).calculate(False).y_axis(heatmap.YAxisConfig().unit(unit))
    _describe(panel, title, description, unit, NEUTRAL, span)
    target = prometheus.Dataquery().expr(query).legend_format("{{le}}").ref_id("A").range()
    return panel.with_target(target.format(PromQueryFormat.HEATMAP).datasource(DATASOURCE))


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column: an expression with one series per row, its title and its unit."""

    expression: str
    title: str
    unit: str
    steps: Steps = NEUTRAL


def table(
    title: str, description: str, key: str, key_title: str, columns: Sequence[Column], *, span: int = 24
) -> tables.Panel:
    """A table with a row for every value of the label `key`, as it is now."""
    panel = tables.Panel().height(_TABLE_HEIGHT)
    _describe(panel, title, description, "short", NEUTRAL, span)
    renamed = {key: key_title}
    for letter, column in zip(_letters(len(columns)), columns, strict=True):
        target = prometheus.Dataquery().expr(column.expression).ref_id(letter).instant()
        panel.with_target(target.format(PromQueryFormat.TABLE).datasource(DATASOURCE))
        renamed[f"Value #{letter}"] = column.title
        values: dict[str, Any] = {"unit": column.unit}
        if column.steps != NEUTRAL:
            values["thresholds"] = {
                "mode": ThresholdsMode.ABSOLUTE.value,
                "steps": [{"value": value, "color": color} for value, color in column.steps],
            }
            values["custom.cellOptions"] = {"type": "color-text"}
        panel.override_by_name(column.title, _properties(values))
    panel.with_transformation(DataTransformerConfig(id_val="merge", options={}))
    order = {name: index for index, name in enumerate(renamed)}
    shown = {"excludeByName": {"Time": True}, "renameByName": renamed, "indexByName": order}
    return panel.with_transformation(DataTransformerConfig(id_val="organize", options=shown))


def _describe(panel: Any, title: str, description: str, unit: str, steps: Steps, span: int) -> None:
    panel.title(title).description(description).unit(unit).span(span).datasource(DATASOURCE)
    values = [Threshold(value=value, color=color) for value, color in steps]
    panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(values))


def _ask(panel: Any, queries: Sequence[Query], *, is_instant: bool = False) -> None:
    for letter, query in zip(_letters(len(queries)), queries, strict=True):
        target = prometheus.Dataquery().expr(query.expression).legend_format(query.legend).ref_id(letter)
        panel.with_target((target.instant() if is_instant else target.range()).datasource(DATASOURCE))


def _legend() -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
    )


def _properties(values: dict[str, Any]) -> list[DynamicConfigValue]:
    return [DynamicConfigValue(id_val=name, value=value) for name, value in values.items()]


def _letters(count: int) -> list[str]:
    assert count <= 26, "a panel's queries are named A to Z"
    return [chr(ord("A") + index) for index in range(count)]
