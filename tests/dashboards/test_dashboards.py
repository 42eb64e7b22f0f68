"""The dashboards' JSON is what `build` writes; every panel says what it shows; metrics not shown are listed."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.metrics import PREFIX
from dashboards.build import text
from dashboards.catalogue import catalogue, metric_of, row, series_name
from dashboards.panel_json import NAMES, Panel, file_of, filled_in, load, panels
from dashboards.render import ALL

ROOT = Path(__file__).parents[2]
NOT_SHOWN = {  # on purpose
    "nanoserve_kv_block_size_tokens": "a setting; blocks are shown as shares of all",
    "nanoserve_kv_cache_budget_bytes": "a setting; the part KV cache of the memory panel is what is used of it",
}


def all_panels() -> list[tuple[str, Panel]]:
    return [(name, panel) for name in NAMES for panel in panels(load(name))]


def series_in(expression: str) -> set[str]:
    """The names of nanoserve's series in it."""
    return set(re.findall(rf"\b{PREFIX}\w+", expression)) - {"nanoserve_process"}


@pytest.mark.parametrize("name", NAMES)
def test_the_json_is_what_build_writes(name: str) -> None:
    assert file_of(name).read_text() == text(name), "run `python -m dashboards.build`"


@pytest.mark.parametrize("name", NAMES)
def test_dashboards_lead_to_each_other_and_can_be_narrowed(name: str) -> None:
    dashboard: Any = load(name)
    assert {link["url"] for link in dashboard["links"]} == {f"/d/nanoserve-{other}" for other in NAMES if other != name}
    assert all(link["includeVars"] and link["keepTime"] for link in dashboard["links"])
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "model", "replica"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_every_panel_says_what_it_shows() -> None:
    for name, panel in all_panels():
        where = f"{name}: {panel.title}"
        assert len(panel.json["description"]) > 10 and panel.json["description"].endswith("."), where
        assert panel.defaults["unit"], where
        assert panel.thresholds and panel.thresholds[0][0] is None, where
        assert panel.json["datasource"]["uid"] == "$datasource", where
        assert panel.targets, where


def test_panels_of_a_dashboard_do_not_overlap() -> None:
    for name in NAMES:
        taken: set[tuple[int, int]] = set()
        for panel in load(name)["panels"]:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24, panel["title"]
            columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
            cells = {(column, line) for column in columns for line in lines}
            assert not cells & taken, panel["title"]
            taken |= cells


def test_every_metric_is_on_a_panel_or_left_out_on_purpose() -> None:
    shown = {
        metric_of(series)
        for _, panel in all_panels()
        for query in panel.targets
        for series in series_in(query.expression)
    }
    assert shown | NOT_SHOWN.keys() == catalogue().keys()
    assert not shown & NOT_SHOWN.keys()


def test_expressions_have_no_variable_but_those_of_the_dashboard() -> None:
    for _, panel in all_panels():
        for query in panel.targets:
            assert "$" not in filled_in(query.expression, ALL)


def test_a_misspelt_metric_cannot_be_asked_for() -> None:
    assert series_name("engine_steps_total") == "nanoserve_engine_steps_total"
    for name in ("engine_step_total", "time_to_first_token_seconds", "engine_steps_total_bucket"):
        with pytest.raises(KeyError):
            series_name(name)


def test_alerts_ask_for_metrics_that_exist_and_say_what_to_do() -> None:
    groups = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 8
    titles = {panel.title for _, panel in all_panels()}
    for rule in rules:
        assert {metric_of(series) for series in series_in(rule["expr"])} <= catalogue().keys(), rule["alert"]
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["dashboard"] in {f"/d/nanoserve-{name}" for name in NAMES}
        assert len(rule["annotations"]["runbook"]) > 100, rule["alert"]
        named = set(re.findall(r'"([A-Z][^"]+)"', rule["annotations"]["runbook"])) - {"Rank N died"}
        assert named <= titles, f"{rule['alert']} names panels that do not exist: {named - titles}"


def test_the_documents_list_every_metric_and_every_alert() -> None:
    observe = (ROOT / "docs/observe.md").read_text()
    for metric in catalogue().values():
        assert f"{row(metric)}\n" in observe, f"`python -m dashboards.catalogue` prints the table; {metric.name}"
    listed = re.findall(rf"^\| `({PREFIX}\w+)`", observe, re.MULTILINE)
    assert listed == list(catalogue())
    groups = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        assert f"`{rule['alert']}`" in observe


def test_troubleshooting_names_panels_that_exist() -> None:
    text = (ROOT / "docs/troubleshoot.md").read_text()
    named = re.findall(r"\*([^*]+)\*", text)
    titles = {panel.title for _, panel in all_panels()}
    assert len(named) > 20
    assert set(named) <= titles, set(named) - titles
