"""Steps of a plan, padded: whatever mix comes, and whatever order streams run in, the model computes the same."""

import random
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.model_config import Architecture
from engine.model_runner import ModelRunner
from engine.pipeline.flight import Flight
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.plan_choice import PlanChoice
from engine.pipeline.schedule import Schedule
from engine.pipeline.split_schedule import split_schedule
from engine.pipeline.stream_lanes import StreamLanes
from engine.pipeline.values import Values
from tests.engine.batch_script import BatchScript
from tests.engine.gpu_case import GREEDY, config_of, random_model, runner_of
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


def padded_runner(config: EngineConfig, schedule: Schedule, lanes: Any) -> ModelRunner:
    """All of its steps that can be run by the schedule are, on these lanes; rows without a token are poisoned."""
    runner = runner_of(config, kernels=True)
    with torch.no_grad():
        runner._model.embed_tokens.shard.weight[POISON] = torch.nan
    runner._preparation.pool.tokens[0, 0] = POISON
    runner._lanes = lanes
    runner.plans = PlanChoice(schedule)
    runner.pad_steps(None)
    return runner


def run_script(runner: ModelRunner, draw: random.Random) -> tuple[list[list[int]], int]:
    """The tokens of random steps: some decodes, some chunks of prompts, none of which fits a border; and how many of
    them ran by the plan.
    """
    script = BatchScript(NUM_BLOCKS, 16)
    left = {row: len(prompt) for row, prompt in PROMPTS.items()}
    for row, prompt in PROMPTS.items():
        script.admit(row, prompt, GREEDY)
    drawn, decoding, num_by_plan = [], [], 0
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
    plain = runner_of(config, kernels=False)
    expected, _ = run_script(plain, random.Random(seed))
    with deferred_cuda() as cuda:
        runner = padded_runner(config, schedule, SettledLanes(cuda, seed))
        assert runner.padded is not None
        if not runner.padded.num_planned:
            return
        tokens, num_by_plan = run_script(runner, random.Random(seed))
    assert tokens == expected and num_by_plan
    ours, theirs = ([*each._kv_cache.keys, *each._kv_cache.values] for each in (runner, plain))
    for one, other in zip(ours, theirs, strict=True):
        assert ((one - other).abs().max() / other.abs().max()).item() < 1e-5


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


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [Architecture.MIXTRAL, Architecture.MISTRAL])
def test_experts_and_windows(architecture: Architecture) -> None:
    config = config_of(architecture, max_batch_tokens=32)
    graph = Pipeline(random_model(config, kernels=False), config.model.hidden_size).graph
    check(config, split_schedule(graph, Cut((NanoBatch(3, 13), NanoBatch(5, 11)))), 2)


@st.composite
def mixed_schedules(draw: st.DrawFn) -> Schedule:
    """Any schedule whose nano-batches have both kinds of token."""
    drawn = draw(schedules(traced_graph(Architecture.LLAMA, 1)))
    assume(all(0 not in (each.num_decodes, each.num_prefills) for each in drawn.cut.nano_batches))
    return drawn


@pytest.mark.slow
@given(schedule=mixed_schedules(), seed=st.integers(0, 2**16))
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_schedule_and_order_of_streams_the_model_computes_the_same(schedule: Schedule, seed: int) -> None:
    check(config_of(Architecture.LLAMA, max_batch_tokens=32), schedule, seed)
