"""What a replica answers when an ingress asks for it: `ReplicaReport`, or a recorded step; unasked it makes neither."""

from dataclasses import dataclass
from enum import StrEnum

from engine import LossWaterfall, RecordedStep


class Question(StrEnum):
    """What an ingress may ask a replica."""

    REPORT = "report"  # how are you: a `ReplicaReport`
    STEP = "step"  # what runs when in your next step: a `RecordedStep` of each rank, none where there is no next step


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """How a replica is. Rates and the waterfall are those of the last seconds (`cluster.recent_losses`).

    `prompt_tokens_per_second` counts prompts begun, with what was cached; `ranks` are process ids, by rank. The
    waterfall is None where no GEMM peak was measured.
    """

    node: str
    ranks: tuple[int, ...]
    uptime_seconds: float
    num_running: int
    num_waiting: int
    kv_usage: float
    num_preemptions: int
    prompt_tokens_per_second: float
    generated_tokens_per_second: float
    waterfall: LossWaterfall | None = None


Answer = ReplicaReport | tuple[RecordedStep, ...]
