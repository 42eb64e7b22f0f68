"""The terminal that a command runs in: drawings as wide as it is, in colours where it has them, and progress."""

import typer
from rich.console import Console

from engine.pipeline.drawing.terminal import draw_in_terminal
from engine.pipeline.timeline import Timeline


def in_terminal(timeline: Timeline) -> str:
    """The drawing as text, with colours only where standard output shows them and $NO_COLOR does not forbid it."""
    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(draw_in_terminal(timeline, console.width), soft_wrap=True)
    return captured.get().rstrip("\n")


def show_progress(text: str) -> None:
    """A line on standard error, so that standard output holds results alone."""
    typer.echo(text, err=True)
