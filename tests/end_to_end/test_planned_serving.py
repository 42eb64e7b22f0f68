"""A server that finds plans stored for its setup runs its steps by them, says so, and draws the same tokens."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import ServingConfig
from engine.config import DeviceKind
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config, write_random_checkpoint
from tests.cluster.serve_command import Command
from tests.end_to_end.stored_plans import store_plans

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SEQUENTIAL = "sequential"
PROMPT_LENGTHS = (100, 200, 290, 380)
NUM_CALLS = 24
NUM_GENERATED = 24
RECIPE = """\
model: tiny
tensor_parallel: 2
threads: 1
device: cpu
dtype: float32
max_batch_tokens: 256
max_sequences: 32
cache: 16MiB
plan_seconds: 0
"""


@dataclass(frozen=True, slots=True)
class Served:
    """The token ids of every call, and what the replica counted."""

    answers: list[list[int]]
    num_steps_by_plan: Counter[str]
    num_steps: float
    overlap_saved_seconds: float


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("models")
    model = sized_config(
        Architecture.LLAMA, hidden_size=256, intermediate_size=704, num_layers=4, max_position_embeddings=1024
    )
    write_random_checkpoint(directory / "tiny", model, seed=3)
    file = directory / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def calls() -> list[dict[str, Any]]:
    """Greedy ones and seeded ones; together far more prompt tokens than fit a step."""
    source = random.Random(5)
    samplings: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.9, "top_p": 0.9, "seed": 7},
        {"temperature": 1.2, "seed": 11, "frequency_penalty": 0.5},
    ]
    return [
        {
            "model": "tiny",
            "prompt": source.choices(range(5, 260), k=PROMPT_LENGTHS[index % len(PROMPT_LENGTHS)]),
            "max_tokens": NUM_GENERATED,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        | samplings[index % len(samplings)]
        for index in range(NUM_CALLS)
    ]


@contextmanager
def serving(directory: Path, recipe: Path, cache: Path, *options: str) -> Iterator[Command]:
    command = Command(directory, recipe, *options, variables={"NANOSERVE_CACHE_DIR": str(cache)})
    try:
        command.wait_ready()
        yield command
    finally:
        command.close()


def serve(server: Command) -> Served:
    """All calls at once, then the replica's metrics."""

    async def post(client: httpx.AsyncClient, call: dict[str, Any]) -> list[int]:
        response = await client.post("/v1/completions", json=call)
        assert response.status_code == 200, response.text
        token_ids: list[int] = response.json()["choices"][0]["token_ids"]
        return token_ids

    async def run() -> list[list[int]]:
        async with httpx.AsyncClient(base_url=server.client.base_url, timeout=120) as client:
            return await asyncio.gather(*(post(client, call) for call in calls()))

    answers = asyncio.run(run())
    (address,) = server.targets("replica")
    exported: dict[str, Counter[str]] = {}
    for family in text_string_to_metric_families(httpx.get(f"http://{address}/metrics").text):
        for sample in family.samples:
            exported.setdefault(sample.name, Counter())[sample.labels.get("plan", "")] += sample.value  # type: ignore[assignment]
    return Served(
        answers=answers,
        num_steps_by_plan=exported["nanoserve_plan_steps_total"],
        num_steps=exported["nanoserve_engine_steps_total"][""],
        overlap_saved_seconds=exported["nanoserve_overlap_saved_seconds_total"][""],
    )


@pytest.mark.timeout(600)  # three servers, one after the other
def test_served_steps_run_by_the_stored_plans_and_draw_the_same_tokens(recipe: Path, tmp_path: Path) -> None:
    config = ServingConfig.load(recipe).engine_config(DeviceKind.CPU)
    plans = store_plans(config, tmp_path / "cache")
    served: dict[str, Served] = {}
    for mode in ("overlap", "nanobatch", SEQUENTIAL):
        directory = tmp_path / mode
        directory.mkdir()
        with serving(directory, recipe, tmp_path / "cache", "--pipeline", mode) as server:
            served[mode] = serve(server)
    for mode, result in served.items():
        assert [len(answer) for answer in result.answers] == [NUM_GENERATED] * NUM_CALLS
        assert len({tuple(answer) for answer in result.answers}) == NUM_CALLS, "every prompt has its own answer"
        assert result.num_steps_by_plan.total() == result.num_steps
        if mode == SEQUENTIAL:
            assert set(result.num_steps_by_plan) == {SEQUENTIAL}
        else:
            assert set(result.num_steps_by_plan) <= plans | {SEQUENTIAL}
            num_planned = result.num_steps - result.num_steps_by_plan[SEQUENTIAL]
            # So many prompt tokens, at most a full batch of them in a step.
            assert num_planned >= sum(len(call["prompt"]) for call in calls()) // config.max_batch_tokens
        assert result.answers == served[SEQUENTIAL].answers
    # Modes that wait for every collective at once save nothing but what passes between its launch and the waiting.
    for mode in ("nanobatch", SEQUENTIAL):
        assert served["overlap"].overlap_saved_seconds > 5 * served[mode].overlap_saved_seconds
