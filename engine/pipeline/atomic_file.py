"""`replace_file`: a file is replaced at once: readers see the old text or the new one, whoever else writes."""

from pathlib import Path
from uuid import uuid4

from engine.errors import ConfigError


def replace_file(path: Path, text: str) -> None:
    """Write `text` beside `path`, then put it in its place; makes the folder. Raises `ConfigError` where it cannot."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
