"""`ConfigJson`: one JSON object of a checkpoint, read key by key with the type that each key must have.

Every failure is a `CheckpointError` that names the file, the key, what was found and what would be right. It knows
no key by name: `engine.model_config` decides which keys there are and what they mean.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from engine.errors import CheckpointError

T = TypeVar("T")


class _Required:
    """The default of a key that has none."""


REQUIRED: Final = _Required()


class ConfigJson:
    """A JSON object and the words that say where it stands. A key that is null counts as absent."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self._values = values

    @classmethod
    def read(cls, path: Path) -> "ConfigJson":
        """Parse the file; raises `CheckpointError` when it is missing or not a JSON object."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; a Hugging Face checkpoint folder holds one.") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is not JSON: {error}.") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} must hold a JSON object, but holds a {type(values).__name__}.")
        return cls(str(path), values)

    def names(self) -> tuple[str, ...]:
        """Every key."""
        return tuple(self._values)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._values.get(key) is not None

    def mentions(self, key: str) -> bool:
        """Whether the key is there, be it null."""
        return key in self._values

    def object(self, *keys: str) -> "ConfigJson":
        """The first of `keys` that is there, as an object; an empty one where none is."""
        key = self._first(keys)
        if key is None:
            return ConfigJson(f"{self.where}: {keys[0]}", {})
        value = self._values[key]
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return ConfigJson(f"{self.where}: {key}", value)

    def integer(self, *keys: str, default: int | _Required = REQUIRED, minimum: int = 1) -> int:
        """The first of `keys` that is there, a whole number of at least `minimum`."""
        key = self._first(keys)
        if key is None:
            return self._default(keys, default)
        value = self._values[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._wrong(key, f"a whole number of at least {minimum}")
        return value

    def number(self, *keys: str, default: float | _Required = REQUIRED) -> float:
        """The first of `keys` that is there, a number above zero."""
        key = self._first(keys)
        if key is None:
            return self._default(keys, default)
        value = self._values[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._wrong(key, "a number above zero")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, *keys: str, default: str | _Required = REQUIRED) -> str:
        """The first of `keys` that is there, a string."""
        key = self._first(keys)
        if key is None:
            return self._default(keys, default)
        value = self._values[key]
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty where the key is absent."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "a list of strings")
        return tuple(value)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers, which may be written as one number; empty where the key is absent."""
        value = self._values.get(key)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values):
            raise self._wrong(key, "a whole number or a list of them")
        return tuple(values)

    def _first(self, keys: tuple[str, ...]) -> str | None:
        return next((key for key in keys if self.has(key)), None)

    def _default(self, keys: tuple[str, ...], default: T | _Required) -> T:
        if isinstance(default, _Required):
            raise CheckpointError(f"{self.where}: {keys[0]} is missing.")
        return default

    def _wrong(self, key: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} must be {wanted}, but is {json.dumps(self._values[key])}.")
