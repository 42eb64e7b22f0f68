"""`nanoserve generate`: a prompt in, text out, in this process, without Ray or HTTP.

For a first look at a checkpoint and for scripts. The prompt is a user's message where the model has a chat template,
a text to continue otherwise or with `--raw`.
"""

import asyncio
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from cluster.config import ServingConfig
from cluster.stop_strings import StopStrings
from cluster.tokenizer import Tokenizer
from engine import EngineConfig, InlineExecutor, LLMEngine, Request, RequestId, SamplingParams, num_usable_cpus

DEFAULT_MAX_TOKENS = 256


def generate(
    model: Annotated[Path, typer.Argument(help="A local checkpoint: config.json, safetensors, tokenizer.")],
    prompt: Annotated[str | None, typer.Argument(help="The prompt; read from standard input if left out.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Generate at most this many tokens (default: 256, or what fits).")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens that add up to this.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given more than once.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or fp8.")] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option(help="Of keys and values: auto (as dtype), fp8, ...")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    pipeline: Annotated[str, typer.Option(help="overlap, nanobatch or sequential.")] = "overlap",
) -> None:
    """Generate text from one prompt and print it as it comes."""
    text = sys.stdin.read() if prompt is None else prompt
    tokenizer = Tokenizer.load(model)
    if raw or not tokenizer.has_chat_template:
        prompt_ids = tokenizer.encode(text)
    else:
        prompt_ids = tokenizer.encode_chat([{"role": "user", "content": text}])
    config = _engine_config(model, dtype, kv_cache_dtype, device, pipeline)
    if max_tokens is None:
        max_tokens = max(1, min(DEFAULT_MAX_TOKENS, config.max_model_len - len(prompt_ids)))
    # The cache holds this one sequence, so that a model of a long context needs no more memory than its answer.
    longest = max(1, min(len(prompt_ids) + max_tokens, config.max_model_len))
    config = replace(config, max_model_len=longest, max_sequences=1)
    request = Request(
        request_id=RequestId("generate"),
        prompt_token_ids=tuple(prompt_ids),
        sampling=SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        ),
    )
    asyncio.run(_print_text(config, tokenizer, request, StopStrings([text for text in stop or [] if text])))


def _engine_config(model: Path, dtype: str, kv_cache_dtype: str, device: str, pipeline: str) -> EngineConfig:
    """One prompt is not worth planning for: stored plans or none."""
    settings = {
        "model": model,
        "dtype": dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "device": device,
        "pipeline": pipeline,
        "plan_seconds": 0,
    }
    recipe = ServingConfig.parse(settings, where="command line")
    return recipe.engine_config(recipe.resolve_device(_num_gpus()), num_threads=num_usable_cpus())


async def _print_text(config: EngineConfig, tokenizer: Tokenizer, request: Request, stops: StopStrings) -> None:
    bar = tqdm(unit="B", unit_scale=True, desc="loading weights", leave=False, disable=None)

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    engine = LLMEngine(config, InlineExecutor(config, progress))
    num_tokens = 0
    hit = False
    try:
        with bar:
            await engine.start()
        started = time.perf_counter()
        detokenizer = tokenizer.detokenizer()
        async for output in engine.generate(request):
            num_tokens += len(output.token_ids)
            text = "".join(map(detokenizer.push, output.token_ids))
            text, hit = stops.push(text + (detokenizer.flush() if output.finish_reason else ""))
            typer.echo(text, nl=False)
            if hit:
                break
        typer.echo("" if hit else stops.flush())
        seconds = time.perf_counter() - started
    finally:
        await engine.close()
    typer.echo(f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.1f} tokens/s", err=True)


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
