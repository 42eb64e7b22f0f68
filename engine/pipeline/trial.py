"""`Trial`: runs schedules for real, on synthetic batches, and tells how long each takes.

All ranks run the same schedules in the same order; a run takes as long as on the slowest rank. Repetitions go round
the schedules, so that a disturbance hits all alike, and a schedule counts with its median. What is timed is what would
be served: on a GPU the CUDA graph of a padded step (`TrialSteps`), by events of the device, where steps are such
graphs; else the pipeline's run, which leaves out what nobody draws from.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.pipeline.agreed_captures import AgreedCaptures
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.rank_agreement import RankAgreement
from engine.pipeline.schedule import Schedule
from engine.pipeline.stopwatch import Stopwatch
from engine.pipeline.synthetic_step import drawn_rows, synthetic_cache, synthetic_step
from engine.pipeline.trial_steps import TrialStep, TrialSteps
from engine.step_clock import StepClock
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel

MIN_ROUNDS, MAX_ROUNDS = 3, 50


@dataclass(frozen=True, slots=True)
class Contestant:
    """A schedule, and whether its collectives overlap with computing."""

    schedule: Schedule
    overlaps: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Medians over the rounds, of the layers of one step: seconds from start to end on the slowest rank, and of this
    rank its computing, its waiting for the network, the time in which collectives flew and the CPU time they took.
    On a GPU the parts are not told apart: everything counts as computing. `rounds` are the seconds of each.
    """

    seconds: float
    compute_seconds: float
    exposed_network_seconds: float
    network_seconds: float
    network_cpu_seconds: float
    rounds: tuple[float, ...]


class Trial:
    """The layers of one rank's model, to be run by any schedule."""

    def __init__(self, config: EngineConfig, pipeline: Pipeline, tensor_parallel: TensorParallel) -> None:
        self._config = config
        self._pipeline = pipeline
        self._device = torch.device(config.device.value)
        self._ranks = RankAgreement(tensor_parallel, self._device)
        self._lanes = pipeline.lanes_on(self._device)
        self._captures = AgreedCaptures(self._device, tensor_parallel) if self._device.type == "cuda" else None

    @torch.inference_mode()
    def run(
        self, contestants: Sequence[Contestant], shape: BatchShape, seconds: float, min_rounds: int = MIN_ROUNDS
    ) -> list[Timing]:
        """Time every contestant on a batch of `shape`, for about so many seconds in all, or the least rounds."""
        contexts = shape.num_decodes * shape.decode_context + shape.num_prefills + shape.prefill_context
        cache = synthetic_cache(self._config, int(contexts) + self._config.max_model_len, self._device)
        runs = self._prepared(contestants, shape, cache)
        rounds: list[list[_Sample]] = [[] for _ in contestants]
        started = Stopwatch.now()
        num_rounds = -1  # the first round warms up
        while num_rounds < min_rounds or (
            num_rounds < MAX_ROUNDS and self._slowest(Stopwatch.now() - started) < seconds
        ):
            for samples, run in zip(rounds, runs, strict=True):
                sample = self._sample(run)
                if num_rounds >= 0:
                    samples.append(sample)
            num_rounds += 1
        return [self._timing(samples) for samples in rounds]

    def _prepared(self, contestants: Sequence[Contestant], shape: BatchShape, cache: KVCache) -> list["_Run"]:
        """What runs each contestant once."""
        padded = TrialSteps.of(self._config, self._pipeline, shape, cache, self._captures)
        if padded is not None:
            sequential = self._pipeline.sequential
            steps = [
                padded.sequential
                if each.schedule == sequential
                else padded.by(each.schedule, self._lanes.of(overlaps=each.overlaps))
                for each in contestants
            ]
            return [_Run(partial(_replay, step), step.fill) for step in steps]
        step = synthetic_step(shape, self._config.max_model_len, cache, self._device)
        step = replace(step, tokens=_random_tokens(len(step.tokens), self._config.model.vocab_size).to(self._device))
        return [_Run(partial(self._launch, step, each)) for each in contestants]

    def _launch(self, step: StepInputs, contestant: Contestant, stopwatch: Stopwatch) -> object:
        lanes = self._lanes.of(overlaps=contestant.overlaps)
        return self._pipeline.run(step, contestant.schedule, lanes, stopwatch, drawn_rows(step))

    def _sample(self, run: "_Run") -> "_Sample":
        run.fill()
        self._ranks.meet()  # ranks begin together
        stopwatch = Stopwatch()
        cpu = time.process_time() - time.thread_time()
        clock = StepClock(self._device)
        run.compute(stopwatch)
        clock.stop()
        seconds = clock.seconds()
        if self._device.type == "cuda":  # the stopwatch saw the host launch it
            return _Sample(self._slowest(seconds), seconds, 0.0, 0.0, 0.0)
        times = stopwatch.times()
        return _Sample(
            self._slowest(seconds),
            seconds - times.exposed_network_seconds,
            times.exposed_network_seconds,
            times.network_seconds,
            time.process_time() - time.thread_time() - cpu,
        )

    def _timing(self, samples: Sequence["_Sample"]) -> Timing:
        medians = [statistics.median(column) for column in zip(*samples, strict=True)]
        return Timing(
            seconds=medians[0],
            compute_seconds=medians[1],
            exposed_network_seconds=medians[2],
            network_seconds=medians[3],
            network_cpu_seconds=medians[4],
            rounds=tuple(sample.seconds for sample in samples),
        )

    def _slowest(self, seconds: float) -> float:
        """What the slowest of the ranks took."""
        return self._ranks.largest([seconds])[0]


@dataclass(frozen=True, slots=True)
class _Run:
    """`compute` is timed, `fill` comes before it."""

    compute: Callable[[Stopwatch], object]
    fill: Callable[[], None] = lambda: None


def _replay(step: TrialStep, stopwatch: Stopwatch) -> object:
    return step.run()


def _random_tokens(num_tokens: int, vocab_size: int) -> Tensor:
    """The same on every rank; all sorts, because equal ones would all be routed to the same experts."""
    return torch.randint(vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))


class _Sample(NamedTuple):
    """One run; the fields of `Timing`."""

    seconds: float
    compute: float
    exposed_network: float
    network: float
    network_cpu: float
