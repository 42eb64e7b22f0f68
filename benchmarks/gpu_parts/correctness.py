"""The part `correctness`: every architecture, tiny and random, through the whole engine on the CPU and on the GPU.

In float32, without TF32: greedy and sampled tokens must be the same. Rounding may part a sequence where two tokens are
nearly equally likely, so a failure here is looked at before it is believed.
"""

import asyncio
from pathlib import Path

import numpy as np
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.ledger import Ledger, Row

from engine.config import DeviceKind, EngineConfig
from engine.inline_executor import InlineExecutor
from engine.llm_engine import LLMEngine
from engine.model_config import Architecture, DType, ModelConfig
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.request import Request, RequestId, SamplingParams

PROMPT_LENGTHS = (1, 7, 16, 33, 100, 250, 400)
NUM_OUTPUT_TOKENS = 48


def check_engine(
    ledger: Ledger,
    budget: Budget,
    folder: Path,
    device: DeviceKind = DeviceKind.CUDA,
    architectures: tuple[Architecture, ...] = tuple(Architecture),
) -> None:
    """One row per architecture."""
    for architecture in architectures:
        if not budget.has(4):
            ledger.skip("engine", architecture.value, NO_TIME)
            continue
        try:
            equal, total = _check_architecture(architecture, folder / architecture.name, device)
        except Exception as error:  # the others may still be right
            note = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            ledger.add(Row(group="engine", name=architecture.value, is_right=False, note=note))
            continue
        note = f"{equal} of {total} sequences equal on CPU and GPU, float32"
        ledger.add(
            Row(group="engine", name=architecture.value, value=equal / total, is_right=equal == total, note=note)
        )


def _check_architecture(architecture: Architecture, folder: Path, device: DeviceKind) -> tuple[int, int]:
    """Equal sequences and all sequences, CPU against the device."""
    window = 48 if architecture is Architecture.MISTRAL else None
    shape = sized_config(architecture, max_position_embeddings=1024, sliding_window=window)
    write_random_checkpoint(folder, shape, seed=3)

    def config(kind: DeviceKind) -> EngineConfig:
        return EngineConfig(
            model=ModelConfig.from_checkpoint(folder),
            checkpoint=folder,
            dtype=DType.FLOAT32,
            device=kind,
            max_model_len=1024,
            max_batch_tokens=128,
            max_sequences=16,
            num_blocks=400,
        )

    expected, got = _tokens_of(config(DeviceKind.CPU)), _tokens_of(config(device))
    return sum(a == b for a, b in zip(expected, got, strict=True)), len(expected)


def _tokens_of(config: EngineConfig) -> list[list[int]]:
    """Greedy and sampled continuations of mixed prompts, all in one crowd."""
    generator = np.random.default_rng(0)
    requests = [
        Request(
            request_id=RequestId(f"{length}-{temperature}"),
            prompt_token_ids=tuple(generator.integers(1, 500, length).tolist()),
            sampling=SamplingParams(
                max_tokens=NUM_OUTPUT_TOKENS, temperature=temperature, top_p=0.95, seed=length, ignore_eos=True
            ),
        )
        for length in PROMPT_LENGTHS
        for temperature in (0.0, 0.8)
    ]

    async def one(engine: LLMEngine, request: Request) -> list[int]:
        return [token async for output in engine.generate(request) for token in output.token_ids]

    async def run() -> list[list[int]]:
        engine = LLMEngine(config, InlineExecutor(config))
        await engine.start()
        try:
            return list(await asyncio.gather(*(one(engine, request) for request in requests)))
        finally:
            await engine.close()

    return asyncio.run(run())
