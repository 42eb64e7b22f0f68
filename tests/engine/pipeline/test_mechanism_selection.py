"""A selection sends the best schedules of every measured mechanism to the trial, and the trial decides."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from engine.batch_shape import BatchShape
from engine.pipeline.graph import OperationGraph
from engine.pipeline.overlap_costs import OverlapCosts
from engine.pipeline.plan import Candidate, Plan
from engine.pipeline.plan_store import PlanStore
from engine.pipeline.schedule import Lane, Mechanism, Schedule
from engine.pipeline.selection import Selector
from engine.pipeline.trial import Contestant, Timing, Trial
from engine.tensor_parallel import TensorParallel
from tests.engine.pipeline.overlap_case import COSTS
from tests.engine.pipeline.rehearsal import CONFIG, FINGERPRINT, Rehearsal, halves, pipeline_of

PIPELINE = pipeline_of(1)
SHAPE = BatchShape(num_decodes=128, num_prefills=128, decode_context=16, prefill_context=8)


def overlapping(schedule: Schedule) -> Schedule:
    """Attention on a lane of its own."""
    steps = schedule.lanes[Lane.COMPUTE]
    attends = [step.node == "decode_attention" for step in steps]
    lanes = {
        Lane.COMPUTE: tuple(step for step, is_attention in zip(steps, attends, strict=True) if not is_attention),
        Lane.MEMORY: tuple(step for step, is_attention in zip(steps, attends, strict=True) if is_attention),
    }
    return replace(schedule, lanes=lanes)


class Planner(Rehearsal):
    """Finds three schedules for whatever prices, and promises most where parts of the device are split."""

    def plan(self, graph: OperationGraph, costs: object, shape: BatchShape, **settings: Any) -> Plan:
        planned = super().plan(graph, costs, shape, **settings)
        is_split = isinstance(costs, OverlapCosts) and costs.mechanism is Mechanism.GREEN
        best = replace(planned.candidates[0], schedule=overlapping(planned.candidates[0].schedule))
        second = replace(planned.candidates[1], schedule=overlapping(planned.candidates[1].schedule))
        other = overlapping(halves(replace(shape, num_prefills=100), graph))
        third = Candidate(schedule=other, period_seconds=0.4, step_seconds=0.7)
        faster = 0.9 if is_split else 1.0
        candidates = tuple(replace(each, step_seconds=faster * each.step_seconds) for each in (best, second, third))
        return replace(planned, candidates=candidates)


@dataclass
class MadeUpTrial:
    """Runs take what the mechanism does; which contestants there were."""

    seconds: dict[Mechanism, float]
    contestants: list[Contestant] = field(default_factory=list)

    def run(self, contestants: Sequence[Contestant], shape: BatchShape, *_: object, **__: object) -> list[Timing]:
        """Sequential comes first and takes a second."""
        self.contestants = self.contestants or list(contestants)
        times = [1.0, *(self.seconds[contestant.schedule.mechanism] for contestant in contestants[1:])]
        return [
            Timing(
                seconds=time,
                compute_seconds=time,
                exposed_network_seconds=0.0,
                network_seconds=0.0,
                network_cpu_seconds=0.0,
                rounds=(time,) * 3,
            )
            for time in times
        ]


def contest_of(trial: MadeUpTrial, path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("engine.pipeline.planner.plan", Planner().plan)
    monkeypatch.setattr("engine.pipeline.selection.fingerprint_of", lambda *_: FINGERPRINT)
    costs = replace(COSTS, graph=PIPELINE.graph)
    selector = Selector(CONFIG, PIPELINE, TensorParallel(), PlanStore(path))
    return selector.contest(SHAPE, costs, cast(Trial, trial), 1.0)


def test_two_of_every_mechanism_are_run_and_the_fastest_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = MadeUpTrial({Mechanism.STREAMS: 0.7, Mechanism.GREEN: 0.8, Mechanism.CORESIDENT: 0.6})
    contest = contest_of(trial, tmp_path, monkeypatch)
    mechanisms = [contestant.schedule.mechanism for contestant in trial.contestants[1:]]
    assert mechanisms == [Mechanism.STREAMS] * 4 + [Mechanism.GREEN] * 2 + [Mechanism.CORESIDENT] * 2
    assert contest.winner.schedule.mechanism is Mechanism.CORESIDENT, "though green was predicted to be"
    free, constant = (trial.contestants[index].schedule for index in (1, 3))
    assert {step.share for _, step in free.steps} == {10} != {step.share for _, step in constant.steps}


def test_sequential_stays_where_no_mechanism_gains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = MadeUpTrial(dict.fromkeys(Mechanism, 1.1))
    assert contest_of(trial, tmp_path, monkeypatch).winner is None
