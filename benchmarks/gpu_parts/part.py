"""`Part`: a share of `make gpu` that runs in a process of its own, how the seconds are dealt out, and what its rows
are called.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum


class Part(StrEnum):
    """In the order in which they run: right first, then ceilings, kernels, and the engine as a whole."""

    KERNELS_CORRECT = "kernels-correct"
    CORRECTNESS = "correctness"
    ACCURACY = "accuracy"
    CEILINGS = "ceilings"
    KERNELS_FAST = "kernels-fast"
    CO_RUN = "co-run"
    PROFILE = "profile"
    PIPELINE = "pipeline"
    THROUGHPUT = "throughput"
    PEERS = "peers"


# Of 570 seconds, when all run; a part alone gets all of them. What each leaves out first: see docs/GPU.md.
WEIGHTS = {
    Part.KERNELS_CORRECT: 85,
    Part.CORRECTNESS: 60,
    Part.ACCURACY: 25,
    Part.CEILINGS: 45,
    Part.KERNELS_FAST: 50,
    Part.CO_RUN: 35,
    Part.PROFILE: 20,
    Part.PIPELINE: 30,
    Part.THROUGHPUT: 190,
    Part.PEERS: 30,
}
SECONDS_TO_BEGIN = 8.0  # a process, torch, a context of CUDA: not counted as the part's own

# Groups of rows that any part may have: what was compiled, clocks and power, and why it ended early.
COMMON_GROUPS = ("compiled", "power", "ended")
# Every other group of a part's rows. The ledger (docs/GPU.md) names each, which a test checks.
GROUPS: Mapping[Part, tuple[str, ...]] = {
    Part.KERNELS_CORRECT: ("correct",),
    Part.CORRECTNESS: ("engine", "graphs"),
    Part.ACCURACY: ("perplexity", "logits"),
    Part.CEILINGS: ("read", "product"),
    Part.KERNELS_FAST: (
        "ceiling", "decode attention", "decode choices", "prefill", "prefill attention", "memory", "sampling",
        "experts",
    ),
    Part.CO_RUN: ("co-run", "green"),
    Part.PROFILE: ("profile",),
    Part.PIPELINE: ("pipeline", "virtual ranks"),
    Part.THROUGHPUT: ("checkpoint", "start", "throughput", "CPU gap", "waterfall"),
    Part.PEERS: ("checkpoint", "peers"),
}  # fmt: skip


def shares(parts: Sequence[Part], seconds: float) -> dict[Part, float]:
    """What each part may take of all seconds, by weight, its beginning taken off."""
    total = sum(WEIGHTS[part] for part in parts)
    available = max(0.0, seconds - SECONDS_TO_BEGIN * len(parts))
    return {part: available * WEIGHTS[part] / total for part in parts}
