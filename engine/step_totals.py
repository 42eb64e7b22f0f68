"""`StepTotals`: what the finished steps of an engine add up to: tokens, device time and its parts, plans."""

from collections import Counter
from dataclasses import dataclass, field

from engine.batch import Batch, StepOutput


@dataclass(slots=True, kw_only=True)
class StepTotals:
    """Counters since the start, under the names of `EngineStats`. Durations in seconds."""

    num_steps: int = 0
    num_timed_steps: int = 0
    num_batch_tokens: int = 0
    num_padding_tokens: int = 0
    num_steps_by_plan: Counter[str] = field(default_factory=Counter)
    device_seconds: float = 0.0
    gemm_seconds: float = 0.0
    attention_seconds: float = 0.0
    exposed_network_seconds: float = 0.0
    network_seconds: float = 0.0
    hidden_network_seconds: float = 0.0

    def add(self, batch: Batch, output: StepOutput) -> None:
        """Count one finished step."""
        self.num_steps += 1
        self.num_batch_tokens += batch.num_tokens
        self.num_padding_tokens += output.num_padding_tokens
        self.num_steps_by_plan[output.plan] += 1
        self.device_seconds += output.device_seconds
        times = output.times
        if times is not None:
            self.num_timed_steps += 1
            self.gemm_seconds += times.gemm_seconds
            self.attention_seconds += times.attention_seconds
            self.exposed_network_seconds += times.exposed_network_seconds
            self.network_seconds += times.network_seconds
            self.hidden_network_seconds += max(0.0, times.network_seconds - times.exposed_network_seconds)
