"""Files that a command writes: refused before anything is computed for them, written when all is done."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.errors import ConfigError

_PICTURES = (".png", ".pdf", ".svg")


def check_output_file(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before anything is computed for it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"the folder {path.absolute().parent} does not exist.")
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder.")
    return path


def check_json_file(name: str | None) -> str | None:
    """The same for a name that may be "-", which is standard output."""
    if name not in (None, "-"):
        check_output_file(Path(name))
    return name


def check_picture_file(path: Path | None) -> Path | None:
    """The same for a picture, whose ending says in which format it is."""
    if path is not None and path.suffix.lower() not in _PICTURES:
        raise typer.BadParameter(f"{path} does not say its format: end it in {', '.join(_PICTURES)}.")
    return check_output_file(path)


JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", callback=check_json_file, help="Write the result as JSON; - is stdout."),
]
PictureFile = Annotated[
    Path | None,
    typer.Option("--png", metavar="FILE", callback=check_picture_file, help="Draw a picture: .png, .pdf or .svg."),
]


def write_result(result: dict[str, Any], summary: str, json_file: str | None) -> None:
    """Print `summary`, and write `result` to `json_file`; "-" prints the JSON instead of the summary."""
    text = json.dumps(result, indent=2)
    if json_file == "-":
        typer.echo(text)
        return
    typer.echo(summary)
    if json_file is not None:
        write_text(Path(json_file), text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file; raises `ConfigError` where that fails after all."""
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
