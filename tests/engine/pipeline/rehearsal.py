"""`Rehearsal`: a selection in which nothing is run, measured or searched; imported by tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.model_config import Architecture, DType
from engine.models import build_model
from engine.operation import TokenKind
from engine.pipeline.nano_batch import NanoBatch
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.plan import Candidate, Plan, StopReason
from engine.pipeline.profile import NodeProfile, Profile, Sample
from engine.pipeline.profiler import ProfileGrid
from engine.pipeline.schedule import Lane, Schedule
from engine.pipeline.trial import Contestant, Timing
from engine.random_checkpoint import sized_config
from engine.tensor_parallel import TensorParallel
from tests.engine.pipeline.schedule_strategies import sequential

MODEL = sized_config(Architecture.LLAMA, hidden_size=32, intermediate_size=48)
CONFIG = EngineConfig(
    model=MODEL,
    checkpoint=Path("/nonexistent"),
    dtype=DType.FLOAT32,
    max_model_len=64,
    max_batch_tokens=256,  # its ladder: 128, 192, 256
    max_sequences=256,
    num_threads=1,
)
FINGERPRINT = {"device": "a test"}
TRIAL_SECONDS = 10.0


def pipeline_of(size: int) -> Pipeline:
    """Of a rank of `size`, which is never run."""
    model = build_model(MODEL, TensorParallel(0, size), torch.float32, torch.device("cpu"))
    return Pipeline(model, MODEL.hidden_size)


PIPELINE = pipeline_of(2)


def halves(shape: BatchShape, *, is_late: bool = False) -> Schedule:
    """Two nano-batches, of which the first is the larger one, or the second."""
    decodes, prefills = int(shape.num_decodes), int(shape.num_prefills)
    parts = [NanoBatch(decodes - decodes // 3, prefills - prefills // 3), NanoBatch(decodes // 3, prefills // 3)]
    return sequential(PIPELINE.graph, *(reversed(parts) if is_late else parts))


@dataclass
class Rehearsal:
    """A planner, a profiler and a clock of its own, and trials that take what the test says; what they were asked."""

    predicted: Callable[[BatchShape], float] = lambda shape: 0.5
    measured: Callable[[BatchShape], float] = lambda shape: 0.5
    network_share: float = 0.3
    now: float = 0.0
    num_profiles: int = 0
    planned: list[BatchShape] = field(default_factory=list)
    tried: list[BatchShape] = field(default_factory=list)
    lanes: set[Lane] = field(default_factory=set)
    told: list[str] = field(default_factory=list)

    def plan(self, graph: object, costs: object, shape: BatchShape, **settings: Any) -> Plan:
        """Two candidates, the second a little slower; a sequential step is predicted to take a second."""
        self.planned.append(shape)
        self.lanes = set(settings["lanes"])
        first = self.predicted(shape)
        candidates = tuple(
            Candidate(schedule=halves(shape, is_late=is_late), period_seconds=seconds / 2, step_seconds=seconds)
            for is_late, seconds in ((False, first), (True, first + 0.01))
        )
        whole = Candidate(schedule=PIPELINE.sequential, period_seconds=0.5, step_seconds=1.0)
        return Plan(
            best=min((whole, *candidates), key=lambda candidate: candidate.step_seconds),
            sequential=whole,
            candidates=candidates,
            num_layers=2,
            lower_bound_seconds=0.1,
            family="made up",
            num_partitions=1,
            num_solved=1,
            solve_seconds=0.0,
            stop_reason=StopReason.OPTIMAL,
        )

    def run(self, contestants: Sequence[Contestant], shape: BatchShape, seconds: float) -> list[Timing]:
        """Sequential takes a second, the first candidate what the test says, the others more."""
        assert not contestants[0].overlaps and all(contestant.overlaps for contestant in contestants[1:])
        if len(contestants) > 1:
            self.tried.append(shape)
        self.now += TRIAL_SECONDS
        times = [1.0, *(self.measured(shape) + 0.01 * number for number in range(len(contestants) - 1))]
        return [
            Timing(
                seconds=time,
                compute_seconds=time * (1 - self.network_share),
                exposed_network_seconds=time * self.network_share,
                network_seconds=time,
                network_cpu_seconds=0.0,
                rounds=(time,) * 3,
            )
            for time in times
        ]

    def profile(self, grid: ProfileGrid) -> Profile:
        """Every operation takes a millisecond."""
        self.num_profiles += 1
        nodes = {
            node.name: NodeProfile(
                (
                    Sample(
                        BatchShape(
                            num_decodes=float(node.tokens is TokenKind.DECODE) * 8,
                            num_prefills=float(node.tokens is not TokenKind.DECODE) * 8,
                        ),
                        0.001,
                    ),
                )
            )
            for node in PIPELINE.graph.nodes
        }
        return Profile(fingerprint=FINGERPRINT, source="made up", element_bytes=4, nodes=nodes)


class Clock:
    """In place of `Stopwatch`, of which a selection reads nothing but the time."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.now = lambda: rehearsal.now
