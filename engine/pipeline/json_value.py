"""`JsonValue`: a value of a JSON file that knows where it stands, read strictly: the type asked for or a `ConfigError`.

Made for the files that this package writes itself and people may edit (profiles, plans): unknown keys, doubled keys,
NaN and wrong types are refused with the file, the path inside it and what would be right.
"""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import ConfigError


class JsonValue:
    """`where` is the file and the path inside it, for messages."""

    def __init__(self, value: Any, file: str, path: str = "") -> None:
        self.value = value
        self.file = file
        self.path = path

    @classmethod
    def parse(cls, text: str, file: str) -> "JsonValue":
        """Raises `ConfigError` for what is not JSON, or has a key twice in one object."""
        try:
            value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_doubled_keys)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file} is not a usable JSON file: {error}.") from None
        return cls(value, file)

    @classmethod
    def read(cls, path: Path) -> "JsonValue":
        """Raises `ConfigError` for a file that is missing, unreadable or not JSON."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not a usable JSON file: {error}.") from None
        return cls.parse(text, str(path))

    @property
    def where(self) -> str:
        """The file and the path inside it."""
        return f"{self.file}: {self.path}" if self.path else self.file

    def refuse(self, wanted: str) -> NoReturn:
        """Raise the `ConfigError` that says what would be right here."""
        found = json.dumps(self.value)
        raise ConfigError(f"{self.where} must be {wanted}, but is {found if len(found) <= 80 else found[:77] + '...'}.")

    def object(self, keys: Collection[str]) -> dict[str, "JsonValue"]:
        """An object with exactly these keys."""
        entries = self.entries()
        for unknown in entries.keys() - set(keys):
            raise ConfigError(f"{self.where} has an unknown key {unknown!r}; its keys are {', '.join(keys)}.")
        for missing in (key for key in keys if key not in entries):
            raise ConfigError(f"{self.where} lacks the key {missing!r}; its keys are {', '.join(keys)}.")
        return entries

    def entries(self) -> dict[str, "JsonValue"]:
        """An object with any keys."""
        if not isinstance(self.value, dict):
            self.refuse("an object")
        prefix = f"{self.path}." if self.path else ""
        return {key: JsonValue(value, self.file, prefix + key) for key, value in self.value.items()}

    def items(self) -> "list[JsonValue]":
        """A list."""
        if not isinstance(self.value, list):
            self.refuse("a list")
        return [JsonValue(value, self.file, f"{self.path}[{index}]") for index, value in enumerate(self.value)]

    def text(self) -> str:
        """A string."""
        if not isinstance(self.value, str):
            self.refuse("a string")
        return self.value

    def number(self, *, is_positive: bool = False) -> float:
        """A finite number that is not negative; with `is_positive` above zero."""
        wanted = "a number above zero" if is_positive else "a number of at least zero"
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            self.refuse(wanted)
        try:
            number = float(self.value)
        except OverflowError:
            number = math.inf
        if not 0 <= number < math.inf or (is_positive and number == 0):
            self.refuse(wanted)
        return number

    def integer(self, minimum: int, maximum: int | None = None) -> int:
        """A whole number within these limits, both included."""
        is_whole = isinstance(self.value, int) and not isinstance(self.value, bool)
        if not is_whole or self.value < minimum or (maximum is not None and self.value > maximum):
            limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            self.refuse(f"a whole number {limits}")
        return int(self.value)


def json_number(number: float) -> str:
    """The shortest text that reads back as the same float: whole numbers without a fraction."""
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that could be meant")


def _refuse_doubled_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {doubled!r} stands twice in one object")
    return entries
