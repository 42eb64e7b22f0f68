"""`PeerEngine`: the port that every engine's worker implements.

Standard library only: peers' interpreters import it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

MAX_BATCH_TOKENS = 2048  # computed per step, by every engine that has such a limit


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """What an engine loads and its limits, the same for all.

    `cache_tokens` is room for all requests of the workload at once. `converted` is a folder, kept between runs, for the
    checkpoint in the engine's own format. `dtype` is "bfloat16" or "float32". Of `options`, "device" is "cuda" for
    those that shall use a GPU.
    """

    checkpoint: Path
    converted: Path
    dtype: str
    num_threads: int
    cache_tokens: int
    max_model_len: int
    max_sequences: int
    options: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRequest:
    """A prompt, and how many tokens to generate greedily whatever they are."""

    prompt: list[int]
    num_output_tokens: int


class PeerEngine(Protocol):
    """A loaded engine."""

    version: str

    def run(self, requests: list[PeerRequest]) -> list[list[int]]:
        """Submit all requests at once and return the tokens generated for each."""
        ...

    def close(self) -> None:
        """Stop threads and processes."""
        ...
