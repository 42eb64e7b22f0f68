"""`Part`: a share of `make gpu` that runs in a process of its own, and how the seconds are dealt out."""

from collections.abc import Sequence
from enum import StrEnum


class Part(StrEnum):
    """In the order in which they run: right first, then ceilings, kernels, and the engine as a whole."""

    KERNELS_CORRECT = "kernels-correct"
    CORRECTNESS = "correctness"
    CEILINGS = "ceilings"
    KERNELS_FAST = "kernels-fast"
    CO_RUN = "co-run"
    PIPELINE = "pipeline"
    THROUGHPUT = "throughput"
    PEERS = "peers"


# Of 570 seconds, when all run; a part alone gets all of them. What each leaves out first: see docs/GPU.md.
WEIGHTS = {
    Part.KERNELS_CORRECT: 95,
    Part.CORRECTNESS: 30,
    Part.CEILINGS: 55,
    Part.KERNELS_FAST: 60,
    Part.CO_RUN: 40,
    Part.PIPELINE: 30,
    Part.THROUGHPUT: 220,
    Part.PEERS: 40,
}
SECONDS_TO_BEGIN = 8.0  # a process, torch, a context of CUDA: not counted as the part's own


def shares(parts: Sequence[Part], seconds: float) -> dict[Part, float]:
    """What each part may take of all seconds, by weight, its beginning taken off."""
    total = sum(WEIGHTS[part] for part in parts)
    available = max(0.0, seconds - SECONDS_TO_BEGIN * len(parts))
    return {part: available * WEIGHTS[part] / total for part in parts}
