"""How long prompts and outputs are: a fixed number, a uniform range, or a lognormal, with or without correlation.

Lengths are whole tokens, at least 1. Everything is drawn from a numpy generator that the caller seeds.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthRange:
    """Uniform over the whole numbers `low` to `high`, both included; equal bounds make a fixed length."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ConfigError(f"A length range must be 1 <= low <= high, but is {self.low}:{self.high}.")

    @classmethod
    def parse(cls, text: str, option: str = "length") -> "LengthRange":
        """Read "512" or "128:512"; raises `ConfigError` naming `option`."""
        match = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", text)
        if match is None:
            raise ConfigError(
                f"{option} must be a number of tokens such as 512 or a range such as 128:512, not {text!r}."
            )
        return cls(low=int(match[1]), high=int(match[2] or match[1]))

    def draw(self, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """`count` lengths."""
        return generator.integers(self.low, self.high, size=count, endpoint=True)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LognormalLengths:
    """exp of a normal with mean ln(`median`) and standard deviation `sigma`, rounded and cut to 1..`maximum`."""

    median: float
    sigma: float
    maximum: int

    def from_normal(self, normal: NDArray[np.float64]) -> NDArray[np.int64]:
        """The lengths that standard normal draws stand for."""
        lengths = np.exp(np.log(self.median) + self.sigma * normal)
        whole: NDArray[np.int64] = np.clip(np.rint(lengths), 1, self.maximum).astype(np.int64)
        return whole
