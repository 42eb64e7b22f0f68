"""Steps of a plan, padded: whatever mix comes, and whatever order streams run in, the model computes the same."""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.model_config import Architecture
from engine.model_runner import ModelRunner
from engine.pipeline.flight import Flight
from engine.pipeline.plan_choice import PlanChoice
from engine.pipeline.schedule import Schedule
from engine.pipeline.stream_lanes import StreamLanes
from engine.pipeline.values import Values
from tests.engine.batch_script import BatchScript
from tests.engine.gpu_case import GREEDY, config_of, runner_of
from tests.engine.pipeline.deferred_cuda import DEVICE as CUDA
from tests.engine.pipeline.deferred_cuda import DeferredCuda, deferred_cuda
from tests.engine.pipeline.schedule_strategies import schedules, traced_graph

pytest.importorskip("triton")

NUM_BLOCKS = 24
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


def run_script(runner: ModelRunner, draw: random.Random, most_tokens: int, num_steps: int) -> list[list[int]]:
    """The tokens of random steps: some decodes, some chunks of prompts, none of which fits a border."""
    script = BatchScript(NUM_BLOCKS, 16)
    left = {row: len(prompt) for row, prompt in PROMPTS.items()}
    for row, prompt in PROMPTS.items():
        script.admit(row, prompt, GREEDY)
    drawn = []
    decoding: list[int] = []
    for _ in range(num_steps):
        decodes = [row for row in decoding if draw.random() < 0.8]
        room, prefills = most_tokens - draw.randint(0, 5) - len(decodes), []
        for row in draw.sample(sorted(left), len(left)):
            size = min(draw.randint(1, 25), left[row], room)
            if size:
                prefills.append((row, size))
                room -= size
                left[row] -= size
        if not decodes and not prefills:
            continue
        runner.pipeline._arena._memory.view(torch.float32).fill_(torch.nan)
        drawn.append(runner.launch(script.step(decodes=decodes, prefills=prefills)).wait().token_ids.tolist())
        for row, _ in prefills:
            if not left[row]:
                del left[row]
                decoding.append(row)
    return drawn


def error_of(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in zip(ours, theirs, strict=True))


@given(st.data())
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_plan_mix_and_order_of_streams_the_model_computes_the_same(data: st.DataObject) -> None:
    config = config_of(Architecture.LLAMA, max_batch_tokens=32)
    graph = traced_graph(Architecture.LLAMA, 1)
    schedule = data.draw(schedules(graph).filter(lambda drawn: drawn.cut.num_decodes and drawn.cut.num_prefills))
    seed = data.draw(st.integers(0, 2**16))
    plain = runner_of(config, kernels=False)
    expected = run_script(plain, random.Random(seed), 30, 6)
    with deferred_cuda() as cuda:
        runner = padded_runner(config, schedule, SettledLanes(cuda, seed))
        assert run_script(runner, random.Random(seed), 30, 6) == expected
    caches = [[*each._kv_cache.keys, *each._kv_cache.values] for each in (runner, plain)]
    assert error_of(*caches) < 1e-5
