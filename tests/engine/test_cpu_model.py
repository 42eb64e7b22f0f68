"""What a CPU's rank does to a model changes no token: packed weights, and kernels compiled for it."""

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import CompileMode, EngineConfig
from engine.inline_executor import InlineExecutor
from engine.llm_engine import LLMEngine
from engine.model_config import Architecture, DType, ModelConfig
from engine.pipeline.chain import Chain
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.request import Request, RequestId, SamplingParams
from engine.worker import Worker


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def config_of(path: Path, architecture: Architecture, compile: CompileMode) -> EngineConfig:
    if not path.exists():
        write_random_checkpoint(path, sized_config(architecture, hidden_size=64, head_dim=16))
    return EngineConfig(
        model=ModelConfig.from_checkpoint(path),
        checkpoint=path,
        dtype=DType.FLOAT32,
        max_model_len=96,
        max_batch_tokens=64,
        max_sequences=8,
        block_size=4,
        num_blocks=200,
        num_threads=1,
        plan_seconds=0,
        compile=compile,
    )


def compiled_kernels(config: EngineConfig) -> set[str]:
    """The names of the kernels that the layers of a rank use."""
    worker = Worker(config)
    worker.start()
    names: set[str] = set()
    for program in worker.runner.pipeline.programs:
        for piece in (piece for bound in program.plain for piece in bound.pieces):
            compiled = piece.compiled if isinstance(piece, Chain) else getattr(piece.operation, "compiled", None)
            if compiled is not None:
                names.add(compiled.kernel.name)
    worker.close()
    return names


def tokens_of(config: EngineConfig) -> list[list[int]]:
    """Greedy answers to eleven prompts of all lengths at once: mixed steps, preemption of none."""

    async def generate() -> list[list[int]]:
        engine = LLMEngine(config, InlineExecutor(config))
        await engine.start()
        sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

        async def one(number: int) -> list[int]:
            prompt = [5 + (number * 31 + place * 7) % 200 for place in range(3 + 6 * number)]
            request = Request(request_id=RequestId(str(number)), prompt_token_ids=tuple(prompt), sampling=sampling)
            return [token async for output in engine.generate(request) for token in output.token_ids]

        answers = await asyncio.gather(*map(one, range(11)))
        await engine.close()
        return answers

    return asyncio.run(generate())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("architecture", [Architecture.LLAMA, Architecture.QWEN3])
def test_compiled_kernels_change_no_token(
    tmp_path: Path, architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where decodes of every length are attended by themselves, which only compiled attention is."""
    monkeypatch.setattr("engine.decode_order._PART_BYTES", 0)
    written, compiled = (
        config_of(tmp_path / "model", architecture, mode) for mode in (CompileMode.NEVER, CompileMode.ALWAYS)
    )
    rotate = "rotate_and_write" if architecture is Architecture.LLAMA else "normalise_rotate_and_write"
    behind_attention = {"linear+add+rms_norm+linear+silu_and_mul+linear+add"}
    assert compiled_kernels(written) == set()
    attention = {"decode_attention", "attend_tiles"}
    assert compiled_kernels(compiled) == {f"rms_norm+linear+{rotate}", *attention, *behind_attention}
    # What is there is used by a model that would not be compiled for; another block size needs other kernels.
    assert compiled_kernels(replace(compiled, compile=CompileMode.AUTO)) == compiled_kernels(compiled)
    other = replace(compiled, compile=CompileMode.AUTO, block_size=8)
    assert compiled_kernels(other) == behind_attention
    answers = tokens_of(written)
    assert len(answers) == 11 and all(len(answer) == 24 for answer in answers)
    assert tokens_of(compiled) == answers


def test_a_small_model_is_not_compiled_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOSERVE_CACHE_DIR", str(tmp_path / "cache"))
    config = config_of(tmp_path / "model", Architecture.LLAMA, CompileMode.AUTO)
    assert compiled_kernels(config) == set()
    assert not (tmp_path / "cache" / "kernels").exists()
