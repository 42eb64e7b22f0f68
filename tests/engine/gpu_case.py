"""Tiny models for the kernels of a GPU, and prompts served to them in mixed batches. Imported by tests."""

from collections.abc import Callable
from pathlib import Path

import torch

from engine.batch import Batch, StepOutput
from engine.config import EngineConfig
from engine.gpu_model import use_gpu_kernels
from engine.kv_cache import KVCache
from engine.model_config import Architecture, DType
from engine.model_runner import ModelRunner
from engine.models import build_model
from engine.models.decoder import Decoder
from engine.pipeline.pipeline import Pipeline
from engine.random_checkpoint import sized_config
from engine.request import SamplingParams
from engine.tensor_parallel import TensorParallel
from tests.engine.batch_script import BatchScript

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_BLOCKS = 24
NUM_TOKENS = 3
PROMPTS = [list(range(7, 26)), [5], list(range(100, 117)), [40, 41, 42]]
GREEDY = SamplingParams(temperature=0)


def config_of(architecture: Architecture, *, dtype: DType = DType.FLOAT32, max_batch_tokens: int = 40) -> EngineConfig:
    """Two layers with heads of 16 elements; Mistral has a window that the longer prompts do not fit."""
    model = sized_config(
        architecture,
        hidden_size=64,
        intermediate_size=48,
        head_dim=16,
        vocab_size=300,
        dtype=dtype,
        sliding_window=9 if architecture is Architecture.MISTRAL else None,
    )
    return EngineConfig(
        model=model,
        checkpoint=Path("/nonexistent"),
        dtype=dtype,
        max_model_len=64,
        max_batch_tokens=max_batch_tokens,
        max_sequences=6,
        block_size=16,
    )


def random_model(config: EngineConfig, *, kernels: bool) -> Decoder:
    """Weights large enough that tokens differ, the same whoever computes with them."""
    model = build_model(config.model, TensorParallel(), getattr(torch, config.dtype.value), DEVICE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.3, generator=generator))
    if kernels:
        told: list[str] = []
        assert use_gpu_kernels(model, config, DEVICE, told.append) and not told
    return model


def runner_of(config: EngineConfig, *, kernels: bool) -> ModelRunner:
    """A runner with a cache of its own."""
    model = random_model(config, kernels=kernels)
    cache = KVCache.allocate(config, NUM_BLOCKS, DEVICE)
    pipeline = Pipeline(model, config.model.hidden_size)
    return ModelRunner(config, model, pipeline, cache, DEVICE, uses_gpu_kernels=kernels)


def answers(
    config: EngineConfig,
    launch: Callable[[Batch], StepOutput],
    samplings: list[SamplingParams],
) -> list[list[int]]:
    """What each prompt is answered: prompts come in chunks, beside decodes, beside other chunks and alone."""
    script = BatchScript(NUM_BLOCKS, config.block_size)
    rows = [4, 0, 5, 2]
    tokens: dict[int, list[int]] = {row: [] for row in rows}
    for row, prompt, sampling in zip(rows, PROMPTS, samplings, strict=True):
        script.admit(row, prompt, sampling)
    chunks = {4: [16, 3], 0: [1], 5: [3, 13, 1], 2: [2, 1]}
    decoding: list[int] = []
    while any(len(drawn) < NUM_TOKENS for drawn in tokens.values()):
        prefills = [(row, sizes.pop(0)) for row, sizes in chunks.items() if sizes]
        decodes = [row for row in decoding if len(tokens[row]) < NUM_TOKENS]
        batch = script.step(decodes=decodes, prefills=prefills)
        output = launch(batch)
        scheduled = [*decodes, *(row for row, _ in prefills)]
        for index, token in zip(batch.sampled.tolist(), output.token_ids.tolist(), strict=True):
            tokens[scheduled[index]].append(token)
        decoding += [row for row, _ in prefills if not chunks[row]]
    return list(tokens.values())
