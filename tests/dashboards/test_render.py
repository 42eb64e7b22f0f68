"""The renderer draws every kind of panel, says which have no data, and writes numbers as Grafana does."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
from matplotlib.figure import Figure

from dashboards.drawing import Line, draw
from dashboards.panel_json import NAMES, Panel, Target, legend_of, load, panels
from dashboards.prometheus import Series
from dashboards.render import render
from dashboards.units import formatted

WINDOW = (1_000_000.0, 1_000_300.0)


class Recorded:
    """A Prometheus that answers everything with two series, or nothing where `is_empty` says so."""

    def __init__(self, empty: str = "\0") -> None:
        self._empty = empty

    def over(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        if self._empty in expression:
            return []
        times = [start + index * step for index in range(10)]
        values = [1.0, math.nan, *(float(index) for index in range(8))]
        return [
            Series(labels(name, le), list(zip(times, values, strict=True))) for name, le in (("a", "1"), ("b", "+Inf"))
        ]

    def instant(self, expression: str, time: float | None = None) -> list[Series]:
        return [Series(series.labels, series.points[-1:]) for series in self.over(expression, *WINDOW, 5)]


def labels(replica: str, le: str) -> Mapping[str, str]:
    return {"replica": replica, "le": le, "loss": replica}


@pytest.mark.parametrize("name", NAMES)
def test_a_dashboard_is_drawn_whole(name: str) -> None:
    dashboard: Any = load(name)
    figure, empty = render(dashboard, Recorded(), WINDOW)
    assert empty == []
    titles = {axes.get_title(loc="left") for axes in figure.axes}
    assert {panel.title for panel in panels(dashboard)} <= titles


def test_panels_without_data_are_told() -> None:
    _, empty = render(load("pipeline"), Recorded("plan_steps"), WINDOW)
    assert empty == ["Plan in use"]


def test_a_number_shows_its_unit_and_the_colour_of_its_threshold() -> None:
    panel = next(panel for panel in panels(load("serving")) if panel.title == "Goodput")
    area = Figure().add_axes((0, 0, 1, 1))
    assert draw(panel, area, [Line("goodput", "A", {}, [1.0, 2.0], [1.0, 0.95])], (0.0, 3.0))
    shown = area.texts[-1]
    assert shown.get_text() == "95.0 %"
    assert shown.get_color() == "#f2871b"


def test_a_kind_of_panel_that_nobody_draws_is_refused() -> None:
    json = {"fieldConfig": {"defaults": {"unit": "s"}, "overrides": []}}
    panel = Panel(title="x", kind="geomap", targets=(), json=json)
    with pytest.raises(KeyError):
        draw(panel, Figure().add_axes((0, 0, 1, 1)), [Line("a", "A", {}, [1.0], [1.0])], (0.0, 2.0))


def test_legends_are_made_of_labels() -> None:
    target = Target(ref="A", expression="up", legend="{{replica}} rank {{ rank }} {{none}}", is_instant=False)
    assert legend_of(target, {"replica": "r1", "rank": "0"}) == "r1 rank 0 "


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.0034, "s", "3.4 ms"),
        (90.0, "s", "90 s"),
        (600.0, "s", "10 min"),
        (0.5, "percentunit", "50 %"),
        (12_345.0, "reqps", "12.3 K req/s"),
        (3 << 20, "bytes", "3 MiB"),
        (0.0021, "percent", "0.0021 %"),
        (-1.5, "short", "-1.5"),
        (7.0, "suffix: tok/s", "7 tok/s"),
    ],
)
def test_numbers_have_their_units(value: float, unit: str, expected: str) -> None:
    assert formatted(value, unit) == expected


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(KeyError):
        formatted(1.0, "furlongs")
