"""The network lane on one GPU: tensor parallelism over virtual ranks (`engine.virtual_ranks`), in the part `pipeline`.

Right: two virtual ranks, in every mode, launched and captured, give the hidden states of the model that is not cut. How
fast: an EMULATION, and rows say so. Both shards' products take turns on the device and the all-reduce is a copy within
its memory, so what may be read off is whether the sums hide behind other work, not how long a step of a group takes.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.ledger import Ledger, Row
from gpu_pipeline import LARGE_BATCHES, LARGE_SHAPE, SMALL_BATCHES, TOLERANCES, Bench

from engine import DType
from engine.kv_cache import KVCache
from engine.model_config import Architecture, ModelConfig
from engine.pipeline.capture import Captures
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.trial import Trial
from engine.random_checkpoint import sized_config
from engine.tensor_parallel import TensorParallel
from engine.virtual_ranks import use_virtual_ranks

NUM_RANKS = 2
# Programs of an all-reduce beside other work. At about 50 GB/s each, 16 of them take as long as 450 GB/s of NVLink.
LIMITS = (8, 16)
_SMALL = sized_config(Architecture.LLAMA, hidden_size=256, intermediate_size=512, num_layers=4, num_heads=8)
# Partial sums are rounded to bfloat16 before they are added up, those of a whole product are not.
_ROUNDED_TOLERANCE = 5e-2
_LEAST_SECONDS = 6.0
_SECONDS_PER_TRIAL = 3.0


def virtual_bench(shape: ModelConfig, dtype: DType, device: torch.device, num_ctas: int) -> Bench:
    """The bench of this model, cut over virtual ranks; weights are the uncut one's."""
    bench = Bench.of(shape, dtype, device)
    use_virtual_ranks(bench.model, NUM_RANKS, num_ctas=num_ctas)
    return replace(bench, pipeline=Pipeline(bench.model, shape.hidden_size))


def run_virtual_network(ledger: Ledger, budget: Budget, device: torch.device) -> None:
    """Rows of what is right; then timings of as many limits as there is time for."""
    if not budget.has(_LEAST_SECONDS):
        ledger.skip("virtual ranks", "checks and timings", NO_TIME)
        return
    for row in check_virtual_ranks(device):
        ledger.add(row)
    for num_ctas in LIMITS:
        if not budget.has(_LEAST_SECONDS):
            ledger.skip("virtual ranks", f"{num_ctas} programs", NO_TIME)
            continue
        for row in measure_virtual_ranks(device, num_ctas, min(_SECONDS_PER_TRIAL, 0.2 * budget.left)):
            ledger.add(row)


@torch.inference_mode()
def check_virtual_ranks(device: torch.device) -> Iterator[Row]:
    """One row per number format and mode: the largest error, relative to the largest element."""
    for dtype, tolerance in TOLERANCES.items():
        whole = Bench.of(_SMALL, dtype, device)
        virtual = virtual_bench(_SMALL, dtype, device, LIMITS[0])
        captures = Captures(device) if device.type == "cuda" else None
        errors: dict[str, float] = {}
        for batch in SMALL_BATCHES:
            cache = KVCache.allocate(whole.config, 2048, device)
            for tensor in (*cache.keys, *cache.values):
                tensor.normal_()
            step = whole.step(batch, cache)
            expected = whole.model(step)
            for mode, contestant in virtual.modes(batch):
                cut = contestant.schedule.cut.scaled(step.num_decodes, len(step.tokens) - step.num_decodes)
                order = torch.from_numpy(cut.positions_of(np.arange(len(step.tokens)))).to(device)
                run = virtual.runner(contestant, step)
                found = {mode: run()[order]}
                if captures is not None:
                    found[f"{mode}, captured"] = captures.capture(run).replay()[order]
                for name, hidden in found.items():
                    difference = (virtual.model.norm(hidden) - expected).abs().max() / expected.abs().max()
                    error = float(difference)
                    errors[name] = max(errors.get(name, 0.0), math.inf if math.isnan(error) else error)
        for name, error in errors.items():
            yield Row(
                group="virtual ranks",
                name=f"{NUM_RANKS} {dtype.value} {name}",
                value=error,
                unit="worst",
                is_right=error <= (tolerance if dtype is DType.FLOAT32 else _ROUNDED_TOLERANCE),
            )


def measure_virtual_ranks(device: torch.device, num_ctas: int, seconds: float) -> Iterator[Row]:
    """One row per batch and mode, captured."""
    bench = virtual_bench(LARGE_SHAPE, DType.BFLOAT16, device, num_ctas)
    trial = Trial(bench.config, bench.pipeline, TensorParallel())
    for batch_name, batch in LARGE_BATCHES.items():
        contestants = dict(bench.modes(batch))
        timings = trial.run(list(contestants.values()), batch, seconds)
        for mode, timing in zip(contestants, timings, strict=True):
            gain = timings[0].seconds / timing.seconds
            details: dict[str, Any] = {"num_ranks": NUM_RANKS, "num_ctas": num_ctas, "rounds": timing.rounds}
            yield Row(
                group="virtual ranks",
                name=f"{batch_name} {NUM_RANKS} ranks, sums on {num_ctas} programs, {mode}",
                value=1e3 * timing.seconds,
                unit="ms",
                note=f"EMULATION; {gain:.3f} x sequential",
                details=details | {"is_emulation": True},
            )
