"""The whole engine against transformers: same checkpoint, greedy, mixed prompts in one batch, prefill in chunks.

And against itself: the same request draws the same tokens alone, in a crowd, after a preemption, with and without
cached prefixes, on one rank and on two.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.worker_group import WorkerGroup
from engine import (
    DType,
    EngineConfig,
    EngineStats,
    Executor,
    InlineExecutor,
    LLMEngine,
    ModelConfig,
    Request,
    RequestId,
    SamplingParams,
)
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.rope_config import RopeConfig

NUM_GENERATED = 64
PROMPT_LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 60, 64, 65, 100, 129, 200, 250, 301, 512, 700)

MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(architecture=Architecture.LLAMA),
    "llama3.1": dict(
        architecture=Architecture.LLAMA,
        rope=RopeConfig(theta=500_000.0, kind="llama3", factor=8.0, original_max_position_embeddings=256),
        tie_word_embeddings=True,
    ),
    "llama-biased": dict(architecture=Architecture.LLAMA, attention_bias=True, mlp_bias=True),
    "qwen2": dict(architecture=Architecture.QWEN2),
    "qwen3": dict(architecture=Architecture.QWEN3, head_dim=32),
    "mistral": dict(architecture=Architecture.MISTRAL, sliding_window=48),
    "mixtral": dict(architecture=Architecture.MIXTRAL),
    "qwen3-moe": dict(architecture=Architecture.QWEN3_MOE, head_dim=32, num_experts=8, num_dense_layers=1),
}


@pytest.fixture(scope="module", params=list(MODELS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("checkpoint") / request.param
    write_random_checkpoint(path, sized_config(**MODELS[request.param], max_position_embeddings=1024), seed=11)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("checkpoint") / "llama"
    write_random_checkpoint(path, sized_config(**MODELS["llama"], max_position_embeddings=1024), seed=5)
    return path


def engine_config(checkpoint: Path, **overrides: Any) -> EngineConfig:
    settings: dict[str, Any] = dict(
        model=ModelConfig.from_checkpoint(checkpoint),
        checkpoint=checkpoint,
        dtype=DType.FLOAT32,
        max_model_len=1024,
        max_batch_tokens=160,  # less than the longest prompts: their prefill is cut
        max_sequences=24,
        block_size=16,  # prompts span many blocks, and 64 of them are too few for all
        num_blocks=400,
        num_threads=1,
        plan_seconds=0,
    )
    return EngineConfig(**(settings | overrides))


def inline(config: EngineConfig) -> Executor:
    return InlineExecutor(config)


def two_ranks(config: EngineConfig) -> Executor:
    return WorkerGroup(config, [{"num_cpus": 0.1}] * 2)


def serve(
    config: EngineConfig, executor: Callable[[EngineConfig], Executor], waves: list[list[Request]]
) -> tuple[dict[str, list[int]], EngineStats]:
    """The tokens of every request; the requests of one wave run together, the waves one after the other."""

    async def one(engine: LLMEngine, request: Request) -> list[int]:
        return [token async for output in engine.generate(request) for token in output.token_ids]

    async def run() -> tuple[dict[str, list[int]], EngineStats]:
        engine = LLMEngine(config, executor(config))
        await engine.start()
        tokens: dict[str, list[int]] = {}
        try:
            for wave in waves:
                results = await asyncio.gather(*(one(engine, request) for request in wave))
                tokens |= {request.request_id: result for request, result in zip(wave, results, strict=True)}
            return tokens, engine.stats()
        finally:
            await engine.close()

    return asyncio.run(run())


def prompts() -> list[tuple[int, ...]]:
    generator = np.random.default_rng(0)
    return [tuple(generator.integers(1, 500, length).tolist()) for length in PROMPT_LENGTHS]


def greedy_requests() -> list[Request]:
    sampling = SamplingParams(max_tokens=NUM_GENERATED, temperature=0.0, ignore_eos=True)
    return [
        Request(request_id=RequestId(str(len(prompt))), prompt_token_ids=prompt, sampling=sampling)
        for prompt in prompts()
    ]


def sampled_requests() -> list[Request]:
    return [
        Request(
            request_id=RequestId(f"{index}"),
            prompt_token_ids=prompt,
            sampling=SamplingParams(
                max_tokens=24, temperature=0.8, top_p=0.95, top_k=50, seed=1000 + index, ignore_eos=True
            ),
        )
        for index, prompt in enumerate(prompts()[4:16])
    ]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, list[int]]:
    """What transformers generates, one prompt at a time."""
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = {}
    for prompt in prompts():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_GENERATED,
            min_new_tokens=NUM_GENERATED,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        tokens[str(len(prompt))] = output[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.slow
def test_greedy_tokens_equal_transformers_on_one_rank(checkpoint: Path, expected: dict[str, list[int]]) -> None:
    tokens, stats = serve(engine_config(checkpoint), inline, [greedy_requests()])
    assert tokens == expected
    assert stats.num_preemptions == 0 and stats.num_used_blocks == 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_greedy_tokens_equal_transformers_on_two_ranks(checkpoint: Path, expected: dict[str, list[int]]) -> None:
    tokens, _ = serve(engine_config(checkpoint, tensor_parallel=2), two_ranks, [greedy_requests()])
    assert tokens == expected


@pytest.fixture(scope="module")
def alone(llama: Path) -> dict[str, list[int]]:
    waves = [[request] for request in sampled_requests()]
    return serve(engine_config(llama, prefix_caching=False), inline, waves)[0]


def test_same_tokens_in_a_crowd(llama: Path, alone: dict[str, list[int]]) -> None:
    tokens, _ = serve(engine_config(llama), inline, [sampled_requests()])
    assert tokens == alone
    assert len({tuple(one) for one in tokens.values()}) == len(tokens)


def test_same_tokens_with_a_cached_prefix(llama: Path, alone: dict[str, list[int]]) -> None:
    again = [
        Request(
            request_id=RequestId(f"again{one.request_id}"), prompt_token_ids=one.prompt_token_ids, sampling=one.sampling
        )
        for one in sampled_requests()
    ]
    tokens, stats = serve(engine_config(llama), inline, [sampled_requests(), again])
    assert stats.num_cached_prompt_tokens > 500
    assert {name: tokens[f"again{name}"] for name in alone} == alone == {name: tokens[name] for name in alone}


def test_same_tokens_after_preemption(llama: Path, alone: dict[str, list[int]]) -> None:
    short = [
        Request(
            request_id=RequestId(f"short{index}"),
            prompt_token_ids=(1, 2),
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
        )
        for index in range(40)
    ]
    config = engine_config(llama, num_blocks=64, prefix_caching=False)
    # After forty one-token answers the scheduler expects short ones, admits too many, and has to take blocks back.
    tokens, stats = serve(config, inline, [[one] for one in short] + [sampled_requests()])
    assert stats.num_preemptions > 0
    assert {name: tokens[name] for name in alone} == alone


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_same_tokens_on_two_ranks(llama: Path, alone: dict[str, list[int]]) -> None:
    tokens, _ = serve(engine_config(llama, tensor_parallel=2), two_ranks, [sampled_requests()])
    assert tokens == alone


def test_another_seed_draws_other_tokens(llama: Path, alone: dict[str, list[int]]) -> None:
    base = sampled_requests()[0]
    other = Request(
        request_id=base.request_id,
        prompt_token_ids=base.prompt_token_ids,
        sampling=SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, top_k=50, seed=7, ignore_eos=True),
    )
    tokens, _ = serve(engine_config(llama), inline, [[other]])
    assert tokens[base.request_id] != alone[base.request_id]
