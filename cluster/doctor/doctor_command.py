"""`nanoserve doctor`: prints what a `Checkup` finds, and ends with a status that scripts can use."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.config import ray_address
from cluster.doctor.checkup import Checkup, exit_status
from cluster.doctor.finding import Finding, Level
from cluster.doctor.shared_memory import DEFAULT_PATH

_MARKS = {Level.OK: ("ok", "green"), Level.WARNING: ("warning", "yellow"), Level.ERROR: ("ERROR", "bold red")}
_MARGIN = 9


def doctor(
    model: Annotated[Path | None, typer.Argument(help="A checkpoint's directory, or a recipe, to check too.")] = None,
    url: Annotated[str | None, typer.Option(help="A running server to check too.")] = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster to check too (default: RAY_ADDRESS, else that of `ray up` here).")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address the server shall listen on (default: 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port it shall listen on (default: 8000).")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    shared_memory: Annotated[Path, typer.Option(help="Where shared memory is mounted.")] = DEFAULT_PATH,
    as_json: Annotated[bool, typer.Option("--json", help="Print findings as JSON.")] = False,
) -> None:
    """Say what would stop a server on this machine, and what to do about it.

    Ends with status 0 where nothing is to be done, 1 with warnings, 2 with errors.
    """
    checkup = Checkup(
        model=model,
        address=ray_address(address),
        url=url,
        host=host,
        port=port,
        device=device,
        shared_memory=shared_memory,
    )
    console = Console(highlight=False)
    findings = []
    for finding in checkup.findings():
        findings.append(finding)
        if not as_json:
            _print(console, finding)
    status = exit_status(findings)
    if as_json:
        typer.echo(json.dumps({"status": status, "findings": [finding.to_json() for finding in findings]}, indent=2))
    else:
        console.print(summary(findings))
    raise typer.Exit(status)


def _print(console: Console, finding: Finding) -> None:
    """A line, and the remedy below; indented where a terminal breaks it, in one piece elsewhere."""
    mark, style = _MARKS[finding.level]
    text = Text.assemble((finding.check, "bold"), f": {finding.found}", (f"  [{finding.where}]", "dim"))
    if finding.remedy:
        text.append(f"\n-> {finding.remedy}")
    if console.is_terminal:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=_MARGIN - 2)
        grid.add_column()
        grid.add_row(Text(mark, style), text)
        console.print(grid)
    else:
        lines = text.plain.replace("\n", "\n" + " " * _MARGIN)
        console.print(f"{mark:<{_MARGIN}}{lines}", markup=False, soft_wrap=True)


def summary(findings: list[Finding]) -> str:
    """What all of it comes to."""
    num_errors = sum(finding.level is Level.ERROR for finding in findings)
    num_warnings = sum(finding.level is Level.WARNING for finding in findings)
    if not num_errors and not num_warnings:
        return "Nothing is in the way."
    return (
        f"{num_errors} error{'' if num_errors == 1 else 's'}, {num_warnings} warning{'' if num_warnings == 1 else 's'}."
    )
