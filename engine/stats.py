"""Numbers the engine tells about itself, as values; exporting them is `cluster.metrics`' job."""

from dataclasses import dataclass, field

from engine.loss import Loss


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot: gauges of this moment and counters since the start. Durations in seconds.

    `num_cached_blocks` are free blocks that still hold a prefix; `num_used_blocks` are referenced by a sequence.
    `num_discarded_tokens` were computed and not delivered: the token after an end of sequence, and the tokens
    recomputed after a preemption. `device_seconds` is time ranks spent computing, `busy_seconds` time the engine had a
    step in flight, `schedule_seconds` time spent composing steps, `queue_seconds` the sum over requests of the time
    between arrival and the first step. `seconds_since_step` is how long requests have been open without a step's end:
    0 without requests, the age of a hanging step where one hangs.

    The parts of `device_seconds` are those of `engine.batch.StepTimes`, summed over the `num_timed_steps` steps that
    have them: with none they are unknown and not zero. `hidden_network_seconds` is what overlap saved: time collectives
    were in flight and nobody waited for them. Of the `accounted_seconds` (up to the last finished step, or up to now
    without requests) `ideal_seconds` is what the useful tokens take at the optimum, less `skipped_head_seconds` that
    prompt tokens save, and `loss_seconds` is the rest by cause: see `LossWaterfall`. These four stay empty and
    `optimal_tokens_per_second`, the group's, is None where no GEMM peak was measured.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
    num_cached_blocks: int = 0
    block_size: int = 0
    num_steps: int = 0
    num_timed_steps: int = 0
    num_batch_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_discarded_tokens: int = 0
    num_padding_tokens: int = 0
    num_preemptions: int = 0
    num_finished: dict[str, int] = field(default_factory=dict)
    num_steps_by_plan: dict[str, int] = field(default_factory=dict)
    device_seconds: float = 0.0
    gemm_seconds: float = 0.0
    attention_seconds: float = 0.0
    exposed_network_seconds: float = 0.0
    network_seconds: float = 0.0
    hidden_network_seconds: float = 0.0
    schedule_seconds: float = 0.0
    busy_seconds: float = 0.0
    queue_seconds: float = 0.0
    seconds_since_step: float = 0.0
    accounted_seconds: float = 0.0
    ideal_seconds: float = 0.0
    skipped_head_seconds: float = 0.0
    loss_seconds: dict[Loss, float] = field(default_factory=dict)
    optimal_tokens_per_second: float | None = None
