"""What the engine does on one CUDA device: right first, then how fast. `make gpu` runs it; no Ray and no network.

    python benchmarks/gpu.py [--part correctness|pipeline|throughput] [--schedules DIR] [--json FILE]

Correctness: every architecture, tiny and random, through the whole engine on the CPU and on the GPU in float32 (no
TF32): the same greedy and sampled tokens. Pipeline: see `gpu_pipeline`. Throughput: Llama-3-8B shapes with
random weights in bfloat16, against the GEMM peak measured in the same run. Rows go to docs/GPU.md with the date and
the versions printed here.
"""

import argparse
import asyncio
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_pipeline import check_pipeline, measure_pipeline

from engine import DeviceKind, DType, EngineConfig, LLMEngine, ModelConfig, Request, RequestId, SamplingParams
from engine.inline_executor import InlineExecutor
from engine.model_config import Architecture
from engine.offline_benchmark import OfflineBenchmark
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.workloads.length_distribution import LengthRange
from engine.workloads.workload_source import WorkloadSource

PARTS = ("correctness", "pipeline", "throughput")
PROMPT_LENGTHS = (1, 7, 16, 33, 100, 250, 400)
WORKLOADS = ((1024, 512), (512, 512), (161, 338))
NUM_REQUESTS = 1536


def tokens_of(config: EngineConfig) -> list[list[int]]:
    """Greedy and sampled continuations of mixed prompts, all in one crowd."""
    generator = np.random.default_rng(0)
    requests = [
        Request(
            request_id=RequestId(f"{length}-{temperature}"),
            prompt_token_ids=tuple(generator.integers(1, 500, length).tolist()),
            sampling=SamplingParams(max_tokens=48, temperature=temperature, top_p=0.95, seed=length, ignore_eos=True),
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


def check_architecture(architecture: Architecture, folder: Path) -> tuple[int, int]:
    """Equal sequences and all sequences, CPU against GPU."""
    window = 48 if architecture is Architecture.MISTRAL else None
    shape = sized_config(architecture, max_position_embeddings=1024, sliding_window=window)
    write_random_checkpoint(folder, shape, seed=3)

    def config(device: DeviceKind) -> EngineConfig:
        return EngineConfig(
            model=ModelConfig.from_checkpoint(folder),
            checkpoint=folder,
            dtype=DType.FLOAT32,
            device=device,
            max_model_len=1024,
            max_batch_tokens=128,
            max_sequences=16,
            num_blocks=400,
        )

    expected, got = tokens_of(config(DeviceKind.CPU)), tokens_of(config(DeviceKind.CUDA))
    return sum(a == b for a, b in zip(expected, got, strict=True)), len(expected)


def check_correctness(root: Path) -> tuple[list[dict[str, Any]], bool]:
    """One row per architecture. Rounding may part a sequence where two tokens are nearly equally likely."""
    rows = []
    for architecture in Architecture:
        equal, total = check_architecture(architecture, root / architecture.name)
        rows.append({"architecture": architecture.value, "equal": equal, "sequences": total})
        print(f"  {architecture.value:24} {equal:3} of {total} sequences equal on CPU and GPU", flush=True)
    return rows, all(row["equal"] == row["sequences"] for row in rows)


def measure_throughput(root: Path) -> list[dict[str, Any]]:
    """One row per workload, on the shapes of Llama-3-8B."""
    folder = root / "llama-3-8b"
    shape = sized_config(
        Architecture.LLAMA,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        vocab_size=128_256,
        max_position_embeddings=8192,
        dtype=DType.BFLOAT16,
    )
    print("  writing random weights of Llama-3-8B shapes", flush=True)
    write_random_checkpoint(folder, shape)
    rows = []
    for num_input, num_output in WORKLOADS:
        source = WorkloadSource(
            prompt=LengthRange.parse(str(num_input), "input"),
            output=LengthRange.parse(str(num_output), "output"),
            name=None,
            trace=None,
            num_requests=NUM_REQUESTS,
            length_divisor=1,
            seed=0,
        )
        config = EngineConfig(
            model=ModelConfig.from_checkpoint(folder),
            checkpoint=folder,
            dtype=DType.BFLOAT16,
            device=DeviceKind.CUDA,
            max_model_len=num_input + num_output,
            max_batch_tokens=2048,
            max_sequences=1024,
        )
        result = OfflineBenchmark(config, source.load()).run().to_json()
        rows.append(result)
        tokens = result["computed_tokens_per_second"]
        busy = 100 * result["device_seconds"] / result["seconds"]
        print(
            f"  {num_input:5}/{num_output:<5} {tokens:10,.0f} tokens/s in + out, "
            f"{result['percent_of_optimum']:5.1f} % of optimum, device busy {busy:5.1f} %",
            flush=True,
        )
    return rows


def main() -> int:
    """Run the chosen parts; 1 where something computed is wrong, 2 where nothing can be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--schedules", type=Path, help="a folder of planned schedules for the pipeline part")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This measures a GPU, and PyTorch sees none.", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}"
    print(f"{torch.cuda.get_device_name()}, {versions}")
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "versions": versions}
    is_right = True
    with tempfile.TemporaryDirectory(prefix="nanoserve-gpu-") as name:
        for part in arguments.part or PARTS:
            print(f"{part}:", flush=True)
            if part == "correctness":
                result[part], is_equal = check_correctness(Path(name))
                is_right &= is_equal
            elif part == "pipeline":
                device = torch.device("cuda", torch.cuda.current_device())
                checks, is_equal = check_pipeline(device)
                is_right &= is_equal
                result[part] = {"checks": checks, "timings": measure_pipeline(device, arguments.schedules)}
            else:
                result[part] = measure_throughput(Path(name))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
