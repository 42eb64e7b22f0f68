"""docs/tune.md names every key of a recipe and every loss; panels, metrics, files and options that it names exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cluster import cli
from cluster.config import ServingConfig
from cluster.metrics import PREFIX
from dashboards.catalogue import catalogue, metric_of
from dashboards.panel_json import NAMES, load, panels
from engine import Loss

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "tune.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", TEXT)
COMMANDS = re.findall(r"^ {4,}(nanoserve (?:.*\\\n)*.*)$", TEXT, re.MULTILINE)


def test_every_key_of_a_recipe_is_named() -> None:
    keys = set()
    for name, key in ServingConfig.model_fields.items():
        section = getattr(key.annotation, "model_fields", None)
        keys |= {name} if section is None else {f"{name}.{inner}" for inner in section}
    assert "routing.prefix_affinity" in keys and "routing" not in keys
    assert keys <= set(CODE), keys - set(CODE)


def test_keys_marked_as_options_are_those_of_serve() -> None:
    serve: Any = typer.main.get_command(cli.app)
    options = {name for parameter in serve.commands["serve"].params for name in parameter.opts}
    rows = re.findall(r"^\| `(\w+)`( \+)?", TEXT, re.MULTILINE)
    keys = {key: bool(mark) for key, mark in rows if key in ServingConfig.model_fields}
    assert len(keys) > 10
    assert keys == {key: f"--{key.replace('_', '-')}" in options for key in keys}


def test_every_loss_has_a_row_with_both_of_its_names() -> None:
    rows = re.findall(r"^\| `(\w+)`, \"([^\"]+)\" \|", TEXT, re.MULTILINE)
    assert rows == [(loss.value, loss.description) for loss in Loss]


def test_panels_and_metrics_exist() -> None:
    titles = {panel.title for name in NAMES for panel in panels(load(name))}
    prose = re.sub(r"^ {4}.*$|`[^`\n]+`|\*\*", "", TEXT, flags=re.MULTILINE)
    named = set(re.findall(r"\*([^*\n]+)\*", prose))
    assert len(named) > 15 and named <= titles, named - titles
    metrics = set(re.findall(rf"\b{PREFIX}\w+", TEXT))
    assert len(metrics) > 2
    assert {metric_of(metric) for metric in metrics} <= catalogue().keys()


def test_links_lead_somewhere_and_others_link_here() -> None:
    links = re.findall(r"\]\(([^)#]+)", TEXT)
    assert len(links) > 8
    for link in links:
        assert (DOCS / link).exists(), link
    for linking in (DOCS.parent / "README.md", DOCS / "observe.md"):
        assert "tune.md" in linking.read_text()


@pytest.mark.parametrize("text", COMMANDS)
def test_commands_have_options_that_exist(text: str) -> None:
    command: Any = typer.main.get_command(cli.app)
    words = shlex.split(text.replace("\\\n", " "), comments=True)[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_recipes_in_it_are_recipes() -> None:
    blocks = re.findall(r"^    model: .*\n(?:    .+\n)+", TEXT, re.MULTILINE)
    assert blocks
    for block in blocks:
        ServingConfig.parse(yaml.safe_load(block), "docs/tune.md")
