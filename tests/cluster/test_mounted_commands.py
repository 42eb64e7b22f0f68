"""The `nanoserve` command has the engine's commands, and help that says all that was written."""

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command

from cluster.cli import app as cluster_app
from engine.cli import app as engine_app


def commands(app: typer.Typer) -> dict[str, Any]:
    """All commands of a program by their names."""
    return dict(_walk("", get_command(app)))


def _walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(command, TyperGroup):
        for child, below in command.commands.items():
            yield from _walk(f"{name} {child}".strip(), below)
    else:
        yield name, command


def test_every_command_of_the_engine_is_mounted() -> None:
    ours, engines = commands(cluster_app), commands(engine_app)
    assert {"profile", "plan", "timeline", "make-model", "bench offline"} <= set(engines) <= set(ours)


@pytest.mark.parametrize("app", [cluster_app, engine_app])
def test_no_help_text_loses_words(app: typer.Typer) -> None:
    """What stands in square brackets is taken for a style and not shown."""
    for name, command in commands(app).items():
        for text in (command.help, *(getattr(parameter, "help", None) for parameter in command.params)):
            assert "[" not in (text or ""), (name, text)
