"""The engine's commands: `bench offline`, `make-model`, and from `engine.commands` `profile`, `plan` and `timeline`.

Token ids only, no Ray; `nanoserve` mounts them. Commands parse options, call one object, and print. Torch is imported
inside a command, so that `--help` is immediate.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from engine.commands.output_file import JsonFile as JsonFile
from engine.commands.output_file import write_result as write_result
from engine.commands.plan import plan
from engine.commands.profile import profile
from engine.commands.timeline import timeline
from engine.config import DeviceKind, EngineConfig, PipelineMode
from engine.errors import NanoserveError
from engine.model_config import Architecture, DType, ModelConfig
from engine.number_format import NumberFormat
from engine.workloads.length_distribution import LengthRange
from engine.workloads.named_workload import WorkloadName
from engine.workloads.workload import Workload
from engine.workloads.workload_source import WorkloadSource

if TYPE_CHECKING:
    from engine.offline_benchmark import OfflineResult

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="An LLM engine for one device group.")
bench = typer.Typer(no_args_is_help=True, help="Measure.")
app.add_typer(bench, name="bench")
app.command("profile")(profile)
app.command("plan")(plan)
app.command("timeline")(timeline)

# CPU memory is shared with everything else on the machine: take what the workload needs, but not more than this.
MAX_CPU_CACHE_BYTES = 4 << 30


class ArchitectureName(StrEnum):
    """The architectures as the command line calls them; the members are those of `Architecture`."""

    LLAMA = "llama"
    MISTRAL = "mistral"
    MIXTRAL = "mixtral"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    QWEN3_MOE = "qwen3-moe"


# Options that `bench offline` and `bench serve` share.
InputLength = Annotated[str, typer.Option("--input-len", help="Prompt tokens: 512, or a range 128:512.")]
OutputLength = Annotated[str, typer.Option("--output-len", help="Output tokens: 128, or a range 16:256.")]
Named = Annotated[WorkloadName | None, typer.Option("--workload", help="Lengths fitted to a real service.")]
TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", exists=True, dir_okay=False, help="Lengths (and times) of a .csv or .jsonl trace, or .gz."),
]
NumRequests = Annotated[int | None, typer.Option(min=1, help="How many (default: all of a trace, else 100).")]
LengthDivisor = Annotated[int, typer.Option(min=1, help="Divide all lengths by this, rounding up.")]
Seed = Annotated[int, typer.Option(min=0, help="Of lengths, arrivals and prompts.")]


@bench.command("offline")
def bench_offline(
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A checkpoint folder.")],
    input_len: InputLength = "512",
    output_len: OutputLength = "128",
    workload: Named = None,
    trace: TraceFile = None,
    num_requests: NumRequests = None,
    length_divisor: LengthDivisor = 1,
    seed: Seed = 0,
    dtype: Annotated[NumberFormat | None, typer.Option(help="Number format (default: the checkpoint's).")] = None,
    kv_cache_dtype: Annotated[NumberFormat | None, typer.Option(help="Of keys and values (default: as dtype).")] = None,
    device: Annotated[DeviceKind | None, typer.Option(help="Default: cuda where there is a GPU.")] = None,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens computed per step.")] = 2048,
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences running at once.")] = 256,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Default: the longest request.")] = None,
    cache_bytes: Annotated[int | None, typer.Option(min=1, help="Memory of the KV cache.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: all cores).")] = None,
    pipeline: Annotated[PipelineMode, typer.Option(help="How a step runs through the layers.")] = PipelineMode.OVERLAP,
    json_file: JsonFile = None,
) -> None:
    """All requests at once through one engine in this process: tokens per second, and percent of the optimum."""
    source = WorkloadSource(
        prompt=LengthRange.parse(input_len, "--input-len"),
        output=LengthRange.parse(output_len, "--output-len"),
        name=workload,
        trace=trace,
        num_requests=num_requests,
        length_divisor=length_divisor,
        seed=seed,
    )
    planned = source.load()
    model_config = ModelConfig.from_checkpoint(model)
    chosen_device = device or _default_device()
    activations = model_config.dtype if dtype is None else dtype.dtype
    if cache_bytes is None and chosen_device is DeviceKind.CPU:
        cache_bytes = _cpu_cache_bytes(model_config, activations, planned, max_sequences)
    config = EngineConfig(
        model=model_config,
        checkpoint=model,
        dtype=activations,
        product_format=dtype,
        kv_cache_format=kv_cache_dtype,
        device=chosen_device,
        max_model_len=max_model_len or min(planned.longest, model_config.max_position_embeddings),
        max_batch_tokens=max_batch_tokens,
        max_sequences=min(max_sequences, max_batch_tokens),
        cache_bytes=cache_bytes,
        num_threads=threads,
        pipeline=pipeline,
    )
    from engine.offline_benchmark import OfflineBenchmark

    with tqdm(total=planned.num_output_tokens, unit="tok", desc="generated", disable=None) as bar:
        result = OfflineBenchmark(config, planned, seed=seed, progress=bar.update).run()
    write_result(result.to_json(), _offline_summary(result), json_file)


@app.command("make-model")
def make_model(
    path: Annotated[Path, typer.Argument(help="The folder to write.")],
    architecture: Annotated[ArchitectureName, typer.Option()] = ArchitectureName.LLAMA,
    hidden_size: Annotated[int, typer.Option(min=1)] = 512,
    intermediate_size: Annotated[int, typer.Option(min=1)] = 1408,
    num_layers: Annotated[int, typer.Option(min=1)] = 8,
    num_heads: Annotated[int, typer.Option(min=1)] = 8,
    num_kv_heads: Annotated[int, typer.Option(min=1)] = 4,
    vocab_size: Annotated[int, typer.Option(min=1)] = 32_000,
    max_positions: Annotated[int, typer.Option(min=1, help="The longest context.")] = 8192,
    num_experts: Annotated[int, typer.Option(min=1, help="Of a mixture of experts.")] = 8,
    experts_per_token: Annotated[int, typer.Option(min=1, help="Of a mixture of experts.")] = 2,
    tie_embeddings: Annotated[bool, typer.Option(help="Share the embedding with the output head.")] = False,
    dtype: Annotated[DType, typer.Option()] = DType.BFLOAT16,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a checkpoint with random weights and a byte-level tokenizer, for measuring and trying things out."""
    from engine.random_checkpoint import sized_config, write_random_checkpoint

    config = sized_config(
        Architecture[architecture.name],
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        vocab_size=vocab_size,
        max_position_embeddings=max_positions,
        num_experts=num_experts,
        num_experts_per_token=experts_per_token,
        tie_word_embeddings=tie_embeddings,
        dtype=dtype,
    )
    write_random_checkpoint(path, config, seed)
    typer.echo(f"Wrote {config.architecture} with random weights to {path}")


def main() -> None:
    """Run the command line; what the project raises on purpose becomes one line on stderr and status 1."""
    try:
        app()
    except NanoserveError as error:
        sys.exit(f"error: {error}")


def _default_device() -> DeviceKind:
    import torch

    return DeviceKind.CUDA if torch.cuda.is_available() else DeviceKind.CPU


def _cpu_cache_bytes(model: ModelConfig, dtype: DType, workload: Workload, max_sequences: int) -> int:
    """Enough for the longest requests to run at once, with room for partly filled blocks."""
    lengths = sorted((item.num_prompt_tokens + item.num_output_tokens for item in workload.requests), reverse=True)
    num_tokens = sum(length + 32 for length in lengths[:max_sequences]) + 1024
    bytes_per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.num_bytes
    return min(num_tokens * bytes_per_token, MAX_CPU_CACHE_BYTES)


def _offline_summary(result: "OfflineResult") -> str:
    values = result.to_json()
    shape = "x".join(map(str, values["gemm_peak_shape"]))
    rows = (
        ("model", f"{values['architecture']}, {values['active_parameters']:,} active parameters, {values['dtype']}"),
        ("device", f"{values['device']}, {values['num_threads']} threads"),
        ("workload", f"{values['num_requests']:,} requests: {values['workload']}"),
        ("tokens in / out", f"{values['num_prompt_tokens']:,} / {values['num_output_tokens']:,}"),
        ("time", f"{values['seconds']:.2f} s"),
        ("tokens in per second", f"{values['prompt_tokens_per_second']:,.1f}"),
        ("tokens out per second", f"{values['output_tokens_per_second']:,.1f}"),
        ("steps", f"{values['num_steps']:,} of {values['mean_batch_tokens']:.1f} tokens on average"),
        ("device busy", f"{100 * result.device_seconds / result.seconds:.1f} % of the time"),
        ("preemptions", f"{values['num_preemptions']:,}"),
        ("GEMM peak", f"{values['gemm_peak_flops_per_second'] / 1e12:,.3f} TFLOP/s, measured at {shape}"),
        ("optimum", f"{values['optimal_tokens_per_second']:,.1f} tokens per second (in + out)"),
        ("pipeline", values["pipeline"]),
        ("plans", ", ".join(f"{plan} x{count:,}" for plan, count in values["num_steps_by_plan"].items())),
        ("percent of optimum", f"{values['percent_of_optimum']:.1f} %"),
    )
    summary = "\n".join(f"{name:<22} {value}" for name, value in rows)
    return f"{summary}\n\n{result.waterfall.table()}"
