"""Steps of a plan, padded: whatever mix comes, and whatever order streams run in, the model computes the same."""

import logging
import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.model_config import Architecture
from engine.model_runner import ModelRunner
from engine.pipeline.capture import CaptureError, CaptureMemoryError, Captures
from engine.pipeline.flight import Flight
from engine.pipeline.graph import OperationGraph
from engine.pipeline.lanes import lanes_for
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.padded_steps import reserve_padded
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.plan_choice import PlanChoice
from engine.pipeline.plan_set import PlanSet, SelectedPlan
from engine.pipeline.schedule import Schedule
from engine.pipeline.split_schedule import split_schedule
from engine.pipeline.stream_lanes import StreamLanes
from engine.pipeline.token_bucket import token_sizes
from engine.pipeline.values import Values
from tests.engine.batch_script import BatchScript
from tests.engine.gpu_case import DEVICE, GREEDY, config_of, random_model, runner_of
from tests.engine.pipeline.deferred_cuda import DEVICE as CUDA
from tests.engine.pipeline.deferred_cuda import DeferredCuda, deferred_cuda
from tests.engine.pipeline.schedule_strategies import schedules, traced_graph

pytest.importorskip("triton")

NUM_BLOCKS = 24
NUM_STEPS = 6
POISON = 299  # a token whose embedding is not a number
PROMPTS = {row: [11 * row + 3 * place for place in range(size)] for row, size in enumerate((0, 58, 1, 60, 3, 55))}
del PROMPTS[0]  # whose first token is the poison


class SettledLanes:
    """`StreamLanes` whose work, real on the CPU, runs in a random order that streams and events allow."""

    runs_plainly = False

    def __init__(self, cuda: DeferredCuda, seed: int) -> None:
        self._cuda = cuda
        self._random = random.Random(seed)
        self._lanes = StreamLanes(CUDA, overlaps=True)

    def begin(self, *arguments: Any) -> Flight | None:
        return self._lanes.begin(*arguments)

    def run(self, *arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            real = Values.run
            patch.setattr(Values, "run", lambda *args: self._cuda.queue(partial(real, *args)))
            self._lanes.run(*arguments)
        self._cuda.settle(self._random.randrange)


def padded_runner(
    config: EngineConfig, schedule: Schedule, lanes: Any, captures: Captures | None = None
) -> ModelRunner:
    """All of its steps that can be run by the schedule are, on these lanes; rows without a token are poisoned."""
    runner = runner_of(config, kernels=True)
    with torch.no_grad():
        runner._model.embed_tokens.shard.weight[POISON] = torch.nan
    runner._preparation.pool.tokens[0, 0] = POISON
    runner._lanes = lanes
    runner.plans = PlanChoice(schedule)
    runner.pad_steps(captures)
    return runner


def run_script(runner: ModelRunner, draw: random.Random) -> tuple[list[list[int]], int]:
    """The tokens of random steps: some decodes, some chunks of prompts, none of which fits a border; and how many of
    them ran by the plan.
    """
    script = BatchScript(NUM_BLOCKS, 16)
    left = {row: len(prompt) for row, prompt in PROMPTS.items()}
    for row, prompt in PROMPTS.items():
        script.admit(row, prompt, GREEDY)
    drawn: list[Any] = []
    decoding: list[int] = []
    num_by_plan = 0
    for _ in range(NUM_STEPS):
        decodes = [row for row in decoding if draw.random() < 0.8]
        room, prefills = runner._config.max_batch_tokens - draw.randint(0, 5) - len(decodes), []
        for row in draw.sample(sorted(left), len(left)):
            size = min(draw.randint(1, 25), left[row], room)
            if size:
                prefills.append((row, size))
                room -= size
                left[row] -= size
        batch = script.step(decodes=decodes, prefills=prefills)
        runner.pipeline._arena._memory.view(torch.float32).fill_(torch.nan)
        drawn.append(runner.launch(batch).wait().token_ids.tolist())
        if runner.padded is not None:
            planned = runner.padded.of(batch, runner.plans.of(batch.num_decodes, 0)[1])
            num_by_plan += planned is not None and planned.schedule != runner.pipeline.sequential
        for row, _ in prefills:
            if not left[row]:
                del left[row]
                decoding.append(row)
    return drawn, num_by_plan


def check(config: EngineConfig, schedule: Schedule, seed: int) -> None:
    """Greedy tokens and everything cached are those of the plain model, of some steps that ran by the plan."""
    with deferred_cuda() as cuda:
        runner = padded_runner(config, schedule, SettledLanes(cuda, seed))
        check_runner(runner, seed)


def check_runner(runner: ModelRunner, seed: int) -> None:
    """`check` of a runner that is there."""
    assert runner.padded is not None
    if not runner.padded.num_planned:
        return
    tokens, num_by_plan = run_script(runner, random.Random(seed))
    plain = runner_of(runner._config, kernels=False)
    expected, _ = run_script(plain, random.Random(seed))
    assert tokens == expected
    assert num_by_plan or any(each.num_chunks == 0 for each in runner.padded._planned[0][2].bucket.nano_batches)
    ours, theirs = ([*each._kv_cache.keys, *each._kv_cache.values] for each in (runner, plain))
    for one, other in zip(ours, theirs, strict=True):
        assert ((one - other).abs().max() / other.abs().max()).item() < 1e-4


# As a planner makes them: the head of the first nano-batch in halves, the tail a layer behind, a lane for the memory.
PLAN = Schedule.parse(
    "nano-batches: 4+12 4+12\n"
    "compute: o_proj[0:16]@1 gate_up_proj[0:16]@1 down_proj[0:16]@1 qkv_proj[0:8] qkv_proj[8:16]"
    " prefill_attention[4:16] o_proj[16:32]@1 gate_up_proj[16:32]@1 down_proj[16:32]@1 qkv_proj[16:32]"
    " prefill_attention[20:32]\n"
    "memory: decode_attention[0:2] decode_attention[2:4] decode_attention[16:20]\n"
)


def test_whatever_mix_comes_a_plan_computes_what_the_model_does() -> None:
    check(config_of(Architecture.LLAMA, max_batch_tokens=32), PLAN, 1)


def test_which_full_batches_a_plan_cannot_serve_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Its first nano-batch is for decodes alone: a quarter of the rows."""
    config = config_of(Architecture.LLAMA, max_batch_tokens=32)
    cut = Cut((NanoBatch(8, 0), NanoBatch(8, 16)))
    schedule = split_schedule(traced_graph(Architecture.LLAMA, 1), cut)
    with deferred_cuda() as cuda, caplog.at_level(logging.INFO):
        runner = padded_runner(replace(config, max_sequences=16), schedule, SettledLanes(cuda, 1))
    assert "32 tokens those with fewer than 8 decodes run sequentially" in caplog.text
    (step,) = [step for size, _, step in runner.padded._planned if size == 32]  # type: ignore[union-attr]
    assert step.bucket.least_decodes == 8
    assert [step.bucket._dealt(number, 32 - number) is None for number in (7, 8, 12)] == [True, False, False]
    caplog.clear()
    with deferred_cuda() as cuda, caplog.at_level(logging.INFO):
        padded_runner(config, PLAN, SettledLanes(cuda, 1))
    assert "run sequentially: decodes" not in caplog.text


@pytest.mark.slow
def test_decodes_with_a_nano_batch_of_their_own() -> None:
    config = config_of(Architecture.LLAMA, max_batch_tokens=32)
    check(config, split_schedule(traced_graph(Architecture.LLAMA, 1), Cut((NanoBatch(2, 0), NanoBatch(3, 27)))), 3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
def test_on_a_device_graphs_of_a_plan_serve_every_mix() -> None:
    config = config_of(Architecture.LLAMA, max_batch_tokens=32)
    for seed in range(10):
        check_runner(padded_runner(config, PLAN, lanes_for(DEVICE, overlaps=True), Captures(DEVICE)), seed)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
def test_rows_of_a_plan_without_a_token_go_to_no_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each nano-batch has its own behind its tokens."""
    from engine.kernels.gpu import expert_routing, mixture_of_experts

    config = config_of(Architecture.MIXTRAL, max_batch_tokens=32)
    graph = Pipeline(random_model(config, kernels=False), config.model.hidden_size).graph
    cut = Cut((NanoBatch(3, 13), NanoBatch(5, 11)))
    rows: list[int] = []
    real = expert_routing.route

    def noting(*arguments: Any, **options: Any) -> Any:
        routing = real(*arguments, **options)
        rows.append(int(routing.starts[-1]) // routing.num_experts_per_token)
        return routing

    monkeypatch.setattr(mixture_of_experts, "route", noting)
    with deferred_cuda() as cuda:
        runner = padded_runner(config, split_schedule(graph, cut), SettledLanes(cuda, 1))
        script = BatchScript(NUM_BLOCKS, 16)
        for row, prompt in PROMPTS.items():
            script.admit(row, prompt, GREEDY)
        runner.launch(script.step(prefills=[(2, 1)])).wait()
        output = runner.launch(script.step(decodes=[2], prefills=[(1, 20), (3, 5)])).wait()
    assert output.num_padding_tokens == 6
    of_step = rows[-2 * config.model.num_layers :]  # of each nano-batch; the first run by a plan learns shapes, too
    assert sum(of_step) == 26 * config.model.num_layers and max(of_step) < 26


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [Architecture.MIXTRAL, Architecture.MISTRAL])
def test_experts_and_windows(architecture: Architecture) -> None:
    config = config_of(architecture, max_batch_tokens=32)
    graph = Pipeline(random_model(config, kernels=False), config.model.hidden_size).graph
    check(config, split_schedule(graph, Cut((NanoBatch(3, 13), NanoBatch(5, 11)))), 2)


@st.composite
def mixed_schedules(draw: st.DrawFn) -> Schedule:
    """Any schedule whose nano-batches have both kinds of token, but for some with decodes alone."""
    drawn = draw(schedules(traced_graph(Architecture.LLAMA, 1)))
    assume(any(0 not in (each.num_decodes, each.num_prefills) for each in drawn.cut.nano_batches))
    assume(all(each.num_decodes for each in drawn.cut.nano_batches))
    return drawn


@pytest.mark.slow
@given(schedule=mixed_schedules(), seed=st.integers(0, 2**16))
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_schedule_and_order_of_streams_the_model_computes_the_same(schedule: Schedule, seed: int) -> None:
    check(config_of(Architecture.LLAMA, max_batch_tokens=32), schedule, seed)


def plan_set(*schedules_of: tuple[int, int, Schedule]) -> PlanSet:
    """Of a dense batch of 32 tokens, for which there is one bucket of each share of decodes."""
    plans = (
        SelectedPlan(
            num_decodes=num_decodes,
            num_prefills=num_prefills,
            schedule=schedule,
            sequential_seconds=1.0,
            plan_seconds=0.9,
            predicted_seconds=0.9,
        )
        for num_decodes, num_prefills, schedule in schedules_of
    )
    return PlanSet(fingerprint={}, max_batch_tokens=32, plans=tuple(plans))


def halves(graph: OperationGraph) -> Schedule:
    return split_schedule(graph, Cut((NanoBatch(2, 14),) * 2))


class Refusing:
    """Stands in for `Captures`: no plan's step can be captured; the others are launched."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.num_refused = 0

    def capture(self, run: Any) -> Any:
        if run.func.__name__ == "_run_cut":
            self.num_refused += 1
            raise self.error
        return SimpleNamespace(replay=run)


@pytest.mark.parametrize(
    ("captures", "num_refused"),
    [(None, 0), (Refusing(CaptureError("It waits.")), 2), (Refusing(CaptureMemoryError("No\nmemory.")), 1)],
    ids=["launched", "refused", "no memory"],
)
def test_batches_run_by_their_plan_where_it_can_be_had(
    captures: Any, num_refused: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The dense batch alone has one here, and a second plan for other mixes of it."""
    runner = runner_of(config_of(Architecture.LLAMA, max_batch_tokens=32), kernels=True)
    schedule = halves(runner.pipeline.graph)
    runner.plans = PlanChoice(runner.pipeline.sequential, plan_set((4, 28, schedule), (16, 16, schedule)))
    runner.pad_steps(captures)
    assert runner.padded is not None and runner.padded.num_planned == (0 if captures else 2)
    script = BatchScript(NUM_BLOCKS, 16)
    for row, prompt in PROMPTS.items():
        script.admit(row, prompt, GREEDY)
    steps = [{"prefills": [(2, 1), (4, 3)]}, {"decodes": [2, 4], "prefills": [(1, 20), (3, 10)]}]
    steps += [{"decodes": [2], "prefills": [(1, 30)]}, {"decodes": [2, 4]}]
    outputs = [runner.launch(script.step(**step)).wait() for step in steps]  # type: ignore[arg-type]
    assert [output.plan for output in outputs[0::2]] == ["sequential"] * 2
    assert [output.num_padding_tokens for output in outputs] == [0, 0, 1, 0]
    assert outputs[1].plan == ("sequential" if captures else "4+28") and outputs[3].plan == "sequential"
    if captures is not None:
        assert captures.num_refused == num_refused == len(caplog.records)
        assert all("padded to 32 tokens run sequentially" in record.message for record in caplog.records)


def test_other_plans_can_follow() -> None:
    runner = runner_of(config_of(Architecture.LLAMA, max_batch_tokens=32), kernels=True)
    schedule = halves(runner.pipeline.graph)
    runner.plans = PlanChoice(runner.pipeline.sequential, plan_set((4, 28, schedule), (16, 16, PLAN)))
    runner.pad_steps(None)
    assert runner.padded is not None and runner.padded.num_planned == 2
    batch = BatchScript(NUM_BLOCKS, 16)
    batch.admit(1, PROMPTS[1], GREEDY)
    dense = batch.step(prefills=[(1, 32)])
    found = [runner.padded.of(dense, each) for each in (schedule, PLAN)]
    assert [each.schedule if each else None for each in found] == [schedule, PLAN]
    runner.use(PlanChoice(runner.pipeline.sequential), overlaps=False)
    assert runner.padded.num_planned == 0
    runner.use(PlanChoice(PLAN), overlaps=False)
    assert runner.padded.num_planned == 3, "32, 16 and 8 rows: fewer are too few for its nano-batches"
    planned = runner.padded.of(dense, PLAN)
    assert planned is not None and planned.schedule == PLAN


def test_memory_for_plans_is_taken_before_they_are_captured() -> None:
    config = config_of(Architecture.LLAMA, max_batch_tokens=32)
    runner = runner_of(config, kernels=True)
    script = BatchScript(NUM_BLOCKS, 16)
    script.admit(1, PROMPTS[1], GREEDY)
    runner.launch(script.step(prefills=[(1, 2)])).wait()
    runner.plans = PlanChoice(runner.pipeline.sequential, plan_set((4, 28, PLAN)))
    reserve_padded(config, runner.pipeline, runner.plans)
    memory = runner.pipeline._arena._memory
    assert len(memory)
    runner.pad_steps(None)
    script.admit(3, PROMPTS[3], GREEDY)
    assert runner.launch(script.step(prefills=[(1, 20), (3, 12)])).wait().plan == "sequential"  # prefill tokens alone
    batch = script.step(prefills=[(1, 20), (3, 12)])
    assert runner.padded is not None
    padded = runner.padded.of(batch, PLAN)
    assert padded is not None and padded.schedule == PLAN
    runner.padded.inputs.clear(padded.step.bucket)
    padded.step.run()
    assert runner.pipeline._arena._memory is memory


@pytest.mark.parametrize(
    ("plan", "sizes"),
    [
        ((1024, 1024), {2048: 1535}),
        ((768, 768), {1536: 1151, 1664: 1247, 1792: 1343, 1920: 1439, 2048: 1535}),
        ((128, 896), {1024: 256, 1152: 288, 1280: 320, 1408: 352, 1536: 384}),
        ((150, 0), {128: 128, 256: 256}),
        ((0, 128), {128: 0, 256: 0}),
    ],
)
def test_a_plan_has_the_sizes_that_its_batches_are_padded_to(plan: tuple[int, int], sizes: dict[int, int]) -> None:
    """Those between its smallest batch and the next plan's; the dense batch is a size of its own."""
    whole = Schedule.parse("nano-batches: 1+1\ncompute: all[0:2]\n")
    planned = Schedule.parse("nano-batches: 2+2\ncompute: all[0:4]\n")
    selected = replace(plan_set((*plan, planned)), max_batch_tokens=2048)
    choice = PlanChoice(whole, selected)
    padded = list(choice.padded(2048))
    assert {size: most_decodes for schedule, size, most_decodes in padded if schedule == planned} == sizes
    for num_tokens in range(1, 2049):
        for num_decodes in (0, num_tokens // 8, num_tokens // 2, num_tokens):
            if choice.of(num_decodes, num_tokens - num_decodes)[1] == planned:
                size = next(size for size in token_sizes(2048) if size >= num_tokens)
                assert num_decodes <= sizes[size]
