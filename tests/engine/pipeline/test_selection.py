"""What is kept, stored and used again, with made-up times; and once for real, on two ranks of a tiny model."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from engine.batch_shape import BatchShape
from engine.config import DeviceKind, EngineConfig, PipelineMode
from engine.local_group import LocalGroup
from engine.model_config import Architecture, DType, ModelConfig
from engine.pipeline import pipeline as pipeline_module
from engine.pipeline import selection
from engine.pipeline.nano_batch import NanoBatch
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.plan_set import PlanSet, SelectedPlan
from engine.pipeline.plan_store import PlanStore
from engine.pipeline.profile import Profile
from engine.pipeline.profile_grid import THOROUGH
from engine.pipeline.schedule import Lane, Schedule, ScheduleError
from engine.pipeline.selection import Effort, Selector, effort_at_start
from engine.pipeline.trial import Contestant, Timing
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.tensor_parallel import TensorParallel
from tests.engine.pipeline.rehearsal import (
    CONFIG,
    EFFORT,
    FINGERPRINT,
    PIPELINE,
    TRIAL_SECONDS,
    Rehearsal,
    halves,
    made_up_profile,
    pipeline_of,
    select_on_rank,
)
from tests.engine.pipeline.schedule_strategies import sequential
from tests.engine.rank_processes import run_ranks

if TYPE_CHECKING:
    from engine.worker import Worker


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> Rehearsal:
    """Nothing is run, measured or searched."""
    found = Rehearsal()
    found.stage(monkeypatch)
    return found


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(tmp_path)


def _select(
    store: PlanStore,
    rehearsal: Rehearsal,
    config: EngineConfig = CONFIG,
    pipeline: Pipeline = PIPELINE,
    effort: Effort | None = EFFORT,
) -> PlanSet | None:
    return Selector(config, pipeline, TensorParallel(), store, rehearsal.told.append).select(effort)


def _stored(schedule: Schedule | None) -> PlanSet:
    plan = SelectedPlan(
        num_decodes=128,
        num_prefills=128,
        schedule=schedule,
        sequential_seconds=1.0,
        plan_seconds=0.7,
        predicted_seconds=0.6,
    )
    return PlanSet(fingerprint=FINGERPRINT, max_batch_tokens=256, plans=(plan,))


MIXED = BatchShape(num_decodes=128, num_prefills=128)


def test_what_was_measured_to_be_faster_is_kept_and_stored(store: PlanStore, rehearsal: Rehearsal) -> None:
    plans = _select(store, rehearsal)
    assert plans is not None
    assert len(plans.plans) == 15  # five kinds of batch, three sizes
    plan = plans.lookup(128, 128)
    assert plan is not None
    assert plan.schedule == halves(MIXED)
    PIPELINE.check(halves(MIXED))
    assert (plan.sequential_seconds, plan.plan_seconds, plan.predicted_seconds) == (1.0, 0.5, 0.5)
    assert plans.profile is not None and rehearsal.num_profiles == 1
    assert store.find(FINGERPRINT).plans == plans
    assert rehearsal.lanes == {Lane.COMPUTE, Lane.NETWORK}
    assert any("256 tokens, mixed: sequential 1000.0 ms" in text for text in rehearsal.told)


@pytest.mark.parametrize(("seconds", "is_kept"), [(0.97, True), (0.99, False), (1.3, False)])
def test_a_winner_needs_the_margin(store: PlanStore, rehearsal: Rehearsal, seconds: float, is_kept: bool) -> None:
    rehearsal.measured = lambda shape: seconds
    plans = _select(store, rehearsal)
    assert plans is not None
    plan = plans.lookup(128, 128)
    assert plan is not None
    assert (plan.schedule is not None) is is_kept
    assert plan.plan_seconds == (seconds if is_kept else 1.0)
    assert any("not enough to be used" in text for text in rehearsal.told) is not is_kept


def test_the_fastest_as_measured_wins_and_not_the_one_predicted(
    store: PlanStore, rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second_is_faster(
        contestants: Sequence[Contestant], shape: BatchShape, seconds: float, min_rounds: int = 3
    ) -> list[Timing]:
        timings = rehearsal.run(contestants, shape, seconds)
        return [timings[0], *reversed(timings[1:])]

    monkeypatch.setattr(selection, "Trial", lambda *_: SimpleNamespace(run=second_is_faster))
    plans = _select(store, rehearsal)
    assert plans is not None
    plan = plans.lookup(128, 128)
    assert plan is not None and plan.schedule == halves(MIXED, is_late=True)
    assert (plan.plan_seconds, plan.predicted_seconds) == (0.5, 0.51)


@pytest.mark.parametrize(("again", "is_kept"), [(0.95, True), (1.0, False)])
def test_a_small_gain_must_be_repeated(
    store: PlanStore, rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch, again: float, is_kept: bool
) -> None:
    confirmed = []

    def run(contestants: Sequence[Contestant], shape: BatchShape, seconds: float, min_rounds: int = 3) -> list[Timing]:
        confirmed.append(min_rounds > 3)
        rehearsal.measured = lambda _: again if confirmed[-1] else 0.95
        return rehearsal.run(contestants, shape, seconds)

    monkeypatch.setattr(selection, "Trial", lambda *_: SimpleNamespace(run=run))
    plans = _select(store, rehearsal)
    assert plans is not None and any(confirmed)
    plan = plans.lookup(128, 128)
    assert plan is not None and (plan.schedule is not None) is is_kept


def test_where_nothing_is_predicted_to_gain_nothing_is_tried(store: PlanStore, rehearsal: Rehearsal) -> None:
    rehearsal.predicted = lambda shape: 0.99
    plans = _select(store, rehearsal)
    assert plans is not None and plans.plans
    assert rehearsal.planned and not rehearsal.tried
    assert plans.schedules == ()
    assert any("no plan promises to be faster" in text for text in rehearsal.told)


def test_where_the_network_takes_little_nothing_is_even_profiled(store: PlanStore, rehearsal: Rehearsal) -> None:
    rehearsal.network_share = 0.03
    assert _select(store, rehearsal) is None
    assert rehearsal.num_profiles == 0 and not rehearsal.planned
    rehearsal.network_share = 0.5
    assert _select(store, rehearsal) is not None, "a verdict from one batch is not for ever"


def test_smaller_batches_are_left_alone_once_a_size_gained_nothing(store: PlanStore, rehearsal: Rehearsal) -> None:
    rehearsal.measured = lambda shape: 0.5 if shape.num_tokens == 256 else 1.0
    plans = _select(store, rehearsal)
    assert plans is not None
    assert {shape.num_tokens for shape in rehearsal.tried} == {256, 192}
    assert len(plans.schedules) == 5
    assert plans.lookup(64, 64) is None


def test_one_kind_of_batch_that_gains_is_enough_to_go_on(store: PlanStore, rehearsal: Rehearsal) -> None:
    rehearsal.measured = lambda shape: 0.5 if shape.num_decodes == shape.num_prefills else 1.0
    plans = _select(store, rehearsal)
    assert plans is not None
    assert {shape.num_tokens for shape in rehearsal.tried} == {256, 192, 128}
    assert {(plan.num_decodes, plan.num_prefills) for plan in plans.plans if plan.schedule} == {
        (128, 128),
        (96, 96),
        (64, 64),
    }


def test_no_bucket_is_begun_after_the_time_is_up(store: PlanStore, rehearsal: Rehearsal) -> None:
    # The first trial finds out what the network takes.
    plans = _select(store, rehearsal, effort=replace(EFFORT, total_seconds=3.5 * TRIAL_SECONDS))
    assert plans is not None
    # What a loaded engine runs most comes first; what was found in time is kept.
    assert [(plan.num_decodes, plan.num_prefills) for plan in plans.plans] == [(128, 128), (224, 32), (256, 0)]
    assert len(plans.schedules) == 3
    assert not plans.is_complete
    assert store.find(FINGERPRINT).plans == plans
    assert _select(store, rehearsal, effort=None) == plans, "without time what is there is used"


def test_the_next_start_goes_on_where_time_was_up(store: PlanStore, rehearsal: Rehearsal) -> None:
    first = _select(store, rehearsal, effort=replace(EFFORT, total_seconds=3.5 * TRIAL_SECONDS))
    rehearsal.planned.clear()
    second = _select(store, rehearsal, effort=replace(EFFORT, total_seconds=2.5 * TRIAL_SECONDS))
    assert first is not None and second is not None
    assert second.plans[:3] == first.plans and len(second.plans) == 6
    assert len(rehearsal.planned) == 3 and rehearsal.num_profiles == 1
    last = _select(store, rehearsal)
    assert last is not None
    assert last.is_complete and last.plans[:6] == second.plans and len(last.plans) == 15
    assert len(rehearsal.planned) == 12 and rehearsal.num_profiles == 1
    assert any("gone on with" in text for text in rehearsal.told)
    assert _select(store, rehearsal) == last and len(rehearsal.planned) == 12


def test_stored_plans_are_used_and_nothing_is_planned(store: PlanStore, rehearsal: Rehearsal) -> None:
    first = _select(store, rehearsal)
    rehearsal.planned.clear()
    rehearsal.told.clear()
    assert _select(store, rehearsal) == first
    assert _select(store, rehearsal, effort=None) == first
    assert rehearsal.num_profiles == 1 and not rehearsal.planned
    assert all(text.startswith("plans of ") for text in rehearsal.told)


def test_without_stored_plans_and_without_time_steps_are_sequential(store: PlanStore, rehearsal: Rehearsal) -> None:
    assert effort_at_start(replace(CONFIG, plan_seconds=0)) is None
    assert _select(store, rehearsal, effort=effort_at_start(replace(CONFIG, plan_seconds=0))) is None
    assert rehearsal.num_profiles == 0
    effort = effort_at_start(replace(CONFIG, plan_seconds=7))
    assert effort is not None and effort.total_seconds == 7


def test_a_stored_plan_that_cannot_be_run_is_reported_and_made_anew(
    store: PlanStore, rehearsal: Rehearsal, caplog: pytest.LogCaptureFixture
) -> None:
    text = str(halves(MIXED))
    store.save(_stored(Schedule.parse(text.replace(" o_proj[0:172]", ""))))
    plans = _select(store, rehearsal)
    assert "cannot be used and are made anew" in caplog.text and "o_proj" in caplog.text
    assert plans is not None and rehearsal.num_profiles == 1
    caplog.clear()
    assert _select(store, rehearsal) == plans
    assert not caplog.records and rehearsal.num_profiles == 1


def test_a_corrupt_file_is_reported_and_made_anew(
    store: PlanStore, rehearsal: Rehearsal, caplog: pytest.LogCaptureFixture
) -> None:
    path = store.save(_stored(halves(MIXED)))
    path.write_text(path.read_text()[:-20])
    plans = _select(store, rehearsal)
    assert str(path) in caplog.text and "JSON" in caplog.text
    assert rehearsal.num_profiles == 1
    assert store.find(FINGERPRINT).plans == plans


def test_a_changed_fingerprint_plans_again_and_says_what_changed(
    store: PlanStore, rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    _select(store, rehearsal)
    monkeypatch.setattr(selection, "fingerprint_of", lambda *_: {"device": "another"})
    rehearsal.told.clear()
    plans = _select(store, rehearsal)
    assert rehearsal.num_profiles == 2
    assert "device a test -> another" in rehearsal.told[0]
    assert plans is not None and plans.fingerprint == {"device": "another"}
    assert store.find(FINGERPRINT).plans is not None


def test_plans_that_cannot_be_stored_are_used_all_the_same(
    tmp_path: Path, rehearsal: Rehearsal, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    plans = _select(PlanStore(tmp_path / "file"), rehearsal)
    assert plans is not None and plans.schedules and rehearsal.num_profiles == 1
    of_profile, of_plans = (record.getMessage() for record in caplog.records)
    assert "cannot be written" in of_profile and "measured again" in of_profile
    assert "could not be stored" in of_plans


def test_a_cache_that_cannot_be_read_is_done_without(
    tmp_path: Path, rehearsal: Rehearsal, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PlanStore(tmp_path)
    path = store.save(_stored(None))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        for name in ("open", "stat"):
            patch.setattr(Path, name, refuse)
        plans = _select(store, rehearsal)
    assert plans is not None and plans.schedules
    assert f"{path} cannot be read" in caplog.text
    assert path.exists() and not path.with_suffix(".corrupt").exists()


def test_what_cannot_be_planned_runs_sequentially_and_is_tried_again(
    store: PlanStore, rehearsal: Rehearsal, caplog: pytest.LogCaptureFixture
) -> None:
    def fails_for_decodes(shape: BatchShape) -> float:
        if not shape.num_prefills:
            raise ScheduleError("not today")
        return 0.5

    rehearsal.predicted = fails_for_decodes
    plans = _select(store, rehearsal)
    assert plans is not None and not plans.is_complete
    assert len(plans.plans) == 12 and plans.lookup(256, 0) is None
    assert "256 tokens, all decode" in caplog.text and "not today" in caplog.text
    rehearsal.predicted = lambda shape: 0.5
    again = _select(store, rehearsal)
    assert again is not None and again.is_complete and again.lookup(256, 0) is not None


def test_no_rank_waits_for_a_first_one_that_failed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run_ranks(select_on_rank, 2, tmp_path)
    texts: dict[str, str] = {}
    for name in ("unwritable", "no planner", "broken store", "healthy"):
        texts[name], of_other = ((tmp_path / f"{name}-{rank}").read_text() for rank in range(2))
        assert texts[name] == of_other
    assert len(PlanSet.parse(texts["unwritable"]).schedules) == 15
    assert PlanSet.parse(texts["no planner"]).plans == ()
    assert not PlanSet.parse(texts["no planner"]).is_complete
    assert texts["broken store"] == "None"
    assert PlanSet.parse(texts["healthy"]).plans == PlanSet.parse(texts["unwritable"]).plans


def test_a_profile_made_on_purpose_is_used_and_not_replaced(store: PlanStore, rehearsal: Rehearsal) -> None:
    path = store.profile_path(FINGERPRINT)
    selector = Selector(CONFIG, PIPELINE, TensorParallel(), store)
    selector.profile(THOROUGH)
    thorough = Profile.read(store.profile_path(FINGERPRINT, "thorough"))
    replace(thorough, nodes=dict(list(thorough.nodes.items())[:-1])).write(path)  # it was interrupted
    begun = path.read_text()
    plans = _select(store, rehearsal)
    assert plans is not None and plans.profile is not None and "quick" in plans.profile.source
    assert rehearsal.num_profiles == 2 and path.read_text() == begun
    thorough.write(path)
    assert selector.profile(EFFORT.grid) == thorough
    assert rehearsal.num_profiles == 2


def test_a_schedule_whose_values_find_no_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    PIPELINE.check(halves(MIXED))
    monkeypatch.setattr(pipeline_module, "shared_places", lambda _: ({"down_proj": "add"}, {}))
    with pytest.raises(ScheduleError, match="would write over add while that may be needed"):
        PIPELINE.check(halves(MIXED))


@pytest.mark.parametrize(
    ("config", "size"), [(replace(CONFIG, pipeline=PipelineMode.SEQUENTIAL), 2), (CONFIG, 1)], ids=["mode", "one lane"]
)
def test_where_there_is_nothing_to_choose_between_nothing_is_looked_up(
    config: EngineConfig, size: int, store: PlanStore, rehearsal: Rehearsal
) -> None:
    store.save(_stored(halves(MIXED)))
    assert _select(store, rehearsal, config, pipeline_of(size)) is None
    assert not rehearsal.told and rehearsal.num_profiles == 0


@pytest.mark.parametrize("size", [1, 2])
def test_a_gpu_has_a_lane_for_memory_and_plans_only_from_a_profile_at_hand(
    size: int, store: PlanStore, rehearsal: Rehearsal
) -> None:
    config, pipeline = replace(CONFIG, device=DeviceKind.CUDA), pipeline_of(size)
    selector = Selector(config, pipeline, TensorParallel(), store, rehearsal.told.append)
    assert selector.can_overlap
    found: list[Profile | None] = [None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Selector, "_profiler", lambda *_: SimpleNamespace(finished=lambda path: found[0]))
        assert selector.select(EFFORT) is None and "`nanoserve profile`" in rehearsal.told[-1]
        found[0] = made_up_profile()
        assert selector.select(None) is None
        planned = selector.select(EFFORT)
    assert planned is not None and planned.plans and Lane.MEMORY in rehearsal.lanes
    assert selector.select(EFFORT) == planned, "as they were stored"


# For real, with nothing made up.


@pytest.fixture(scope="module")
def group_config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """Two ranks with batches so small that two buckets are all there is to plan."""
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, sized_config(Architecture.LLAMA, hidden_size=128, intermediate_size=256))
    return EngineConfig(
        model=ModelConfig.from_checkpoint(path),
        checkpoint=path,
        dtype=DType.FLOAT32,
        tensor_parallel=2,
        max_model_len=64,
        max_batch_tokens=64,
        max_sequences=8,
        num_blocks=64,
        num_threads=1,
        plan_seconds=120,
    )


def _log_to(path: Path, rank: int) -> None:
    """Runs first in every rank: what it tells goes to the file."""
    torch.set_num_threads(1)
    logging.basicConfig(filename=path.with_suffix(f".{rank}"), level=logging.INFO, format="%(message)s")


def _choices(worker: "Worker") -> tuple[list[tuple[str, str]], int]:
    """Name and schedule of some batches, as this rank would run them; the memory it holds for values in between."""
    runner = worker.runner
    batches = [(0, 64), (8, 56), (4, 60), (8, 20)]
    choices = [(name, str(schedule)) for batch in batches for name, schedule in [runner.plans.of(*batch)]]
    return choices, runner.pipeline.arena_bytes


def _started(config: EngineConfig, log: Path) -> tuple[list[tuple[list[tuple[str, str]], int]], str, float]:
    """`_choices` of the ranks, what rank 0 told, and the seconds that the start took."""
    began = time.monotonic()
    with LocalGroup(config, partial(_log_to, log)) as group:
        seconds = time.monotonic() - began
        return group.run(_choices), log.with_suffix(".0").read_text(), seconds


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The ranks inherit the environment."""
    monkeypatch.setenv("NANOSERVE_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"


@pytest.mark.slow
def test_a_first_start_plans_and_a_second_uses_it(group_config: EngineConfig, cache: Path, tmp_path: Path) -> None:
    ((choices, _), (of_other, _)), told, first_seconds = _started(group_config, tmp_path / "first")
    assert "no plans are stored yet" in told and "measuring the operations of a layer" in told
    assert choices == of_other
    (file,) = cache.glob("*/plans/*.json")
    (profile_file,) = cache.glob("*/profiles/*.json")
    plans = PlanSet.parse(file.read_text())
    assert plans.profile == Profile.read(profile_file) and plans.plans
    by_name = {f"{plan.num_decodes}+{plan.num_prefills}": plan.schedule for plan in plans.plans}
    for name, text in choices:
        assert name == "sequential" or str(by_name[name]) == text
    for plan in plans.plans:
        assert f"{plan.num_decodes + plan.num_prefills} tokens" in told
        assert plan.plan_seconds <= plan.sequential_seconds

    # Whether anything won depends on the machine; so that a plan is there to be used, one wins now.
    schedule = sequential(PIPELINE.graph, NanoBatch(0, 40), NanoBatch(0, 24))
    won = SelectedPlan(
        num_decodes=0,
        num_prefills=64,
        schedule=schedule,
        sequential_seconds=2.0,
        plan_seconds=1.0,
        predicted_seconds=1.0,
    )
    PlanStore(cache).save(replace(plans, plans=(won,), is_complete=True))
    written = file.stat().st_mtime_ns, profile_file.stat().st_mtime_ns
    ((choices, arena_bytes), (of_other, _)), told, second_seconds = _started(group_config, tmp_path / "second")
    assert f"plans of {file}" in told and "measuring" not in told
    assert choices == of_other
    assert choices[0] == ("0+64", str(schedule))
    assert [name for name, _ in choices[1:]] == ["sequential"] * 3
    # No step of this many tokens has run yet: the memory for it was taken at the start.
    assert arena_bytes >= group_config.max_batch_tokens * group_config.dtype.num_bytes * (128 + 256)
    assert (file.stat().st_mtime_ns, profile_file.stat().st_mtime_ns) == written
    assert second_seconds < first_seconds
