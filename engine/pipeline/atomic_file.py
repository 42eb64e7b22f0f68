"""Files that several processes share: `replace_file` replaces one at once, so that readers see the old text or the new
one, whoever else writes; `read_file` does without one that cannot be read now.
"""

import logging
from pathlib import Path
from uuid import uuid4

from engine.errors import ConfigError

_log = logging.getLogger(__name__)


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


def read_file(path: Path) -> str | None:
    """The text of the file; None where there is none or, with a warning, where it cannot be read, for now or for us.

    Raises `ConfigError` for a file that holds no text: that will not change by itself.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        _log.warning("%s cannot be read and is done without: %s.", path, error.strerror)
        return None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a usable JSON file: {error}.") from None
