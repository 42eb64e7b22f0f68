"""`Rehearsal`: a selection in which nothing is run, measured or searched; imported by tests and by ranks they start."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.model_config import Architecture, DType
from engine.models import build_model
from engine.number_format import NumberFormat
from engine.operation import TokenKind
from engine.pipeline import selection
from engine.pipeline.agreed_times import AgreedTimes
from engine.pipeline.graph import OperationGraph
from engine.pipeline.nano_batch import NanoBatch
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.plan import Candidate, Plan, StopReason
from engine.pipeline.plan_set import PlanSet
from engine.pipeline.plan_store import PlanStore
from engine.pipeline.profile import NodeProfile, Profile, Sample
from engine.pipeline.profile_grid import QUICK
from engine.pipeline.profiler import Profiler
from engine.pipeline.schedule import Lane, Schedule
from engine.pipeline.selection import Effort, Selector
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
EFFORT = Effort(grid=QUICK, seconds_per_bucket=1.0, total_seconds=1000.0)


def pipeline_of(size: int) -> Pipeline:
    """Of a rank of `size`, which is never run."""
    model = build_model(MODEL, TensorParallel(0, size), torch.float32, torch.device("cpu"))
    return Pipeline(model, MODEL.hidden_size)


PIPELINE = pipeline_of(2)


def halves(shape: BatchShape, graph: OperationGraph = PIPELINE.graph, *, is_late: bool = False) -> Schedule:
    """Two nano-batches, of which the first is the larger one, or the second."""
    decodes, prefills = int(shape.num_decodes), int(shape.num_prefills)
    parts = [NanoBatch(decodes - decodes // 3, prefills - prefills // 3), NanoBatch(decodes // 3, prefills // 3)]
    return sequential(graph, *(reversed(parts) if is_late else parts))


@dataclass
class Rehearsal:
    """A planner, a profiler and a clock of its own, and trials that take what the test says; what they were asked."""

    predicted: Callable[[BatchShape], float] = lambda shape: 0.5
    measured: Callable[[BatchShape], float] = lambda shape: 0.5
    network_share: float = 0.3
    now: float = 0.0
    num_measured: int = 0
    planned: list[BatchShape] = field(default_factory=list)
    tried: list[BatchShape] = field(default_factory=list)
    lanes: set[Lane] = field(default_factory=set)
    told: list[str] = field(default_factory=list)

    def stage(self, patch: pytest.MonkeyPatch) -> None:
        """Put this in the place of what runs, measures and searches; what reads and writes files stays."""
        patch.setattr("engine.pipeline.planner.plan", self.plan)
        patch.setattr(selection, "Trial", lambda *_: self)
        patch.setattr(selection, "Stopwatch", Clock(self))
        patch.setattr(selection, "fingerprint_of", lambda *_: FINGERPRINT)
        patch.setattr(Profiler, "_load", lambda *_: None)
        patch.setattr(AgreedTimes, "medians", lambda _, loads, *__, **___: self.medians(len(loads)))
        patch.setattr(Profiler, "_pair_speeds", lambda *_: (1.0, 1.0))

    @property
    def num_profiles(self) -> int:
        """How often the whole layer was measured."""
        assert self.num_measured % len(PIPELINE.graph.nodes) == 0
        return self.num_measured // len(PIPELINE.graph.nodes)

    def medians(self, count: int) -> list[float]:
        """Of one node: every operation takes a millisecond."""
        self.num_measured += 1
        return [0.001] * count

    def plan(self, graph: OperationGraph, costs: object, shape: BatchShape, **settings: Any) -> Plan:
        """Two candidates, the second a little slower; a sequential step is predicted to take a second."""
        self.planned.append(shape)
        self.lanes = set(settings["lanes"])
        first = self.predicted(shape)
        candidates = tuple(
            Candidate(schedule=halves(shape, graph, is_late=is_late), period_seconds=seconds / 2, step_seconds=seconds)
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

    def run(
        self, contestants: Sequence[Contestant], shape: BatchShape, seconds: float, min_rounds: int = 3
    ) -> list[Timing]:
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


def made_up_profile() -> Profile:
    """Every operation takes a millisecond."""
    nodes = {}
    for node in PIPELINE.graph.nodes:
        is_decode = node.tokens is TokenKind.DECODE
        shape = BatchShape(num_decodes=8.0 * is_decode, num_prefills=8.0 * (not is_decode))
        nodes[node.name] = NodeProfile((Sample(shape, 0.001),))
    return Profile(fingerprint=FINGERPRINT, source="made up", number_format=NumberFormat.FLOAT32, nodes=nodes)


class Clock:
    """In place of `Stopwatch`, of which a selection reads nothing but the time."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.now = lambda: rehearsal.now


class FailingStore(PlanStore):
    """Fails in a way that nobody foresaw, as a search on rank 0 might."""

    def find(self, fingerprint: object) -> Any:
        raise AssertionError("a store that is broken")


def _no_planner(*_: object, **__: object) -> Plan:
    raise ImportError("a planner that is not installed")


def select_on_rank(rank: int, size: int, folder: Path) -> None:
    """One rank of a group in which only rank 0 meets a failure; writes what came of each selection to the folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=20),  # a rank left waiting fails
    )
    tensor_parallel = TensorParallel(rank, size, dist.group.WORLD)
    writable, unwritable = folder / f"cache-{rank}", folder / ("file" if rank == 0 else "cache-1")

    def select(name: str, store: PlanStore) -> None:
        with pytest.MonkeyPatch.context() as patch:
            rehearsal = Rehearsal()
            rehearsal.stage(patch)
            if name == "no planner" and rank == 0:
                patch.setattr("engine.pipeline.planner.plan", _no_planner)
            plans: PlanSet | None = Selector(CONFIG, PIPELINE, tensor_parallel, store).select(EFFORT)
        (folder / f"{name}-{rank}").write_text(str(plans))

    select("unwritable", PlanStore(unwritable))
    select("no planner", PlanStore(writable))
    select("broken store", FailingStore(writable) if rank == 0 else PlanStore(writable))
    select("healthy", PlanStore(writable))
    dist.barrier()
    dist.destroy_process_group()
