"""The nano-batch pipeline on one CUDA device: right first, then what overlapping gains; a part of `gpu.py`.

Right: tiny random models, dense and with experts, run sequentially, as nano-batches and overlapped by every mechanism
that the device and the kernels offer, launched one by one and as a captured graph, give the hidden states and greedy
tokens of the plain model. Speed: layers of Llama-3-8B's
shapes with random weights, a batch of decodes and a mixed one; every schedule captured, and launched one by one.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_parts.planned_schedules import LeftOut, planned_schedules
from torch import Tensor

from engine import DeviceKind, DType, EngineConfig
from engine.batch_shape import BatchShape
from engine.errors import ConfigError
from engine.gpu_model import use_gpu_kernels
from engine.kv_cache import KVCache
from engine.model_config import Architecture, ModelConfig
from engine.models import build_model
from engine.models.decoder import Decoder
from engine.operation import TokenKind
from engine.pipeline.capture import Captures
from engine.pipeline.granted_loads import GrantedLoads
from engine.pipeline.graph import OperationGraph
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.placement import GPU_LANES, lane_of
from engine.pipeline.schedule import ALL_UNITS, Lane, Mechanism, Schedule, Step
from engine.pipeline.stopwatch import Stopwatch
from engine.pipeline.synthetic_step import synthetic_cache, synthetic_step
from engine.pipeline.trial import Contestant, Trial
from engine.pipeline.trial_steps import TrialSteps
from engine.random_checkpoint import sized_config
from engine.step_clock import StepClock
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel

NUM_REPEATS = 10
SMALL_BATCHES = (
    BatchShape(num_decodes=96, num_prefills=160, decode_context=60, prefill_context=40),
    BatchShape(num_decodes=128, num_prefills=0, decode_context=90),
    BatchShape(num_decodes=0, num_prefills=200, prefill_context=50),
    BatchShape(num_decodes=3, num_prefills=5, decode_context=7, prefill_context=3),
)
# Layers of Llama-3-8B's sizes.
LARGE_SHAPE = sized_config(
    Architecture.LLAMA,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=4,
    num_heads=32,
    num_kv_heads=8,
    vocab_size=1024,
    dtype=DType.BFLOAT16,
)
LARGE_BATCHES = {
    "decodes": BatchShape(num_decodes=1024, num_prefills=0, decode_context=1024),
    "mixed": BatchShape(num_decodes=677, num_prefills=1355, decode_context=1280, prefill_context=512),
}
# The relative error allowed, by the largest element: in float32 other sizes of products round otherwise; in bfloat16
# the same kernels run on the same sizes, launched and captured, so hardly anything may.
TOLERANCES = {DType.FLOAT32: 1e-4, DType.BFLOAT16: 2e-2}
# Of a mode in bfloat16 against the plain model, which rounds otherwise all the way: what is wrong is off by far more.
ROUNDED_TOLERANCE = 0.1
_AGAINST_PLAIN = "against plain"
SECONDS_PER_TRIAL = 8.0
# What the matrix products leave to attention while it runs beside them, in tenths of the execution units.
COMPUTE_SHARE = 7


def two_nano_batches(graph: OperationGraph, num_decodes: int, num_prefills: int, share: int = ALL_UNITS) -> Schedule:
    """Halves of the batch take turns: while one attends, the other multiplies (reference: NanoFlow, figure 6).

    What follows the attention of a layer runs a period later, so that each half multiplies from one attention to its
    next without a break. `share`: tenths of the execution units for the compute lane, the rest for the memory lane.
    """
    cut = Cut(
        (
            NanoBatch(num_decodes - num_decodes // 2, num_prefills // 2),
            NanoBatch(num_decodes // 2, num_prefills - num_prefills // 2),
        )
    )
    absent = {TokenKind.DECODE} if not num_decodes else {TokenKind.PREFILL} if not num_prefills else set()
    other_branches = set(graph.branches[1:])
    nodes = [node for node in graph.nodes if node.tokens not in absent and node.branch not in other_branches]
    after: set[str] = set()
    for node in nodes:
        producers = {producer for value in node.inputs for producer in graph.producers.get(value, ())}
        if producers & after or any(graph.by_name[name].cache_reads for name in producers):
            after.add(node.name)
    lanes: dict[Lane, list[Step]] = {lane: [] for lane in GPU_LANES}
    for start, stop in zip(cut.borders, cut.borders[1:], strict=False):
        for is_tail in (True, False):
            for node in nodes:
                if (node.name in after) is is_tail and stop > start:
                    lane = lane_of(node, GPU_LANES)
                    part = {Lane.COMPUTE: share, Lane.MEMORY: ALL_UNITS - share or ALL_UNITS}.get(lane, ALL_UNITS)
                    lanes[lane].append(Step(node.name, start, stop, part, int(is_tail)))
    return Schedule(cut, {lane: tuple(steps) for lane, steps in lanes.items() if steps})


@dataclass(frozen=True)
class Bench:
    """A model with random weights on a device, and its pipeline."""

    config: EngineConfig
    device: torch.device
    model: Decoder
    pipeline: Pipeline

    @classmethod
    def of(cls, shape: ModelConfig, dtype: DType, device: torch.device) -> "Bench":
        """Weights are scaled so that activations keep their size."""
        config = EngineConfig(
            model=shape,
            checkpoint=Path("unused"),
            dtype=dtype,
            device=DeviceKind(device.type),
            max_model_len=min(2048, shape.max_position_embeddings),
            max_batch_tokens=2048,
            max_sequences=1024,
        )
        model = build_model(shape, TensorParallel(), getattr(torch, dtype.value), device)
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(std=parameter.shape[-1] ** -0.5)
        if device.type == "cuda":
            use_gpu_kernels(model, config, device, print)
        return cls(config, device, model, Pipeline(model, shape.hidden_size))

    def step(self, shape: BatchShape, cache: KVCache) -> StepInputs:
        """Random tokens, so that they differ and are routed to all sorts of experts."""
        step = synthetic_step(shape, self.config.max_model_len, cache, self.device)
        return replace(step, tokens=torch.randint_like(step.tokens, self.config.model.vocab_size))

    def modes(self, shape: BatchShape, mechanisms: Iterable[Mechanism] = ()) -> Iterator[tuple[str, Contestant]]:
        """The three modes of the engine, `overlap` on streams without shares; then it by mechanisms with theirs."""
        sizes = int(shape.num_decodes), int(shape.num_prefills)
        halves = two_nano_batches(self.pipeline.graph, *sizes)
        self.pipeline.check(halves)
        yield "sequential", Contestant(self.pipeline.sequential, False)
        yield "nanobatch", Contestant(halves, False)
        yield "overlap", Contestant(halves, True)
        for mechanism in mechanisms if shape.num_decodes else ():  # it is decodes that run beside products
            share = ALL_UNITS if mechanism is Mechanism.CORESIDENT else COMPUTE_SHARE
            schedule = replace(two_nano_batches(self.pipeline.graph, *sizes, share), mechanism=mechanism)
            self.pipeline.check(schedule)
            yield f"overlap by {mechanism}", Contestant(schedule, True)

    def offered(self) -> list[Mechanism]:
        """What lanes can overlap by on this device with this model's kernels; the log says why not by the others."""
        if self.device.type != "cuda":
            return list(Mechanism)
        offered = GrantedLoads(self.device, self.pipeline.units, self.pipeline.lanes_on(self.device).grants).offered()
        return [mechanism for mechanism, is_offered in offered.items() if is_offered]

    def runner(self, contestant: Contestant, step: StepInputs) -> Callable[[], Tensor]:
        """What runs the layers once and returns the hidden states."""
        lanes = self.pipeline.lanes_on(self.device).of(overlaps=contestant.overlaps)
        return lambda: self.pipeline.run(step, contestant.schedule, lanes, Stopwatch())


def check_pipeline(device: torch.device) -> Iterator[dict[str, Any]]:
    """One row per model, number format and mode: the largest relative error of all batches and repeats."""
    for architecture in (Architecture.LLAMA, Architecture.MIXTRAL):
        shape = sized_config(
            architecture, hidden_size=256, intermediate_size=512, num_layers=4, num_heads=8, num_kv_heads=2
        )
        for dtype in TOLERANCES:
            bench = Bench.of(shape, dtype, device)
            # Where no kernels compute them, products of experts in float32 wait for the host: no graph then.
            captures = None
            if device.type == "cuda" and (
                bench.pipeline.units is not None or not (shape.num_experts and dtype is DType.FLOAT32)
            ):
                captures = Captures(device)
            errors: dict[str, float] = {}
            equal = True
            try:
                for batch in SMALL_BATCHES:
                    equal &= _check_batch(bench, batch, captures, errors)
            except Exception as failure:  # the other models may still be right, and timings are worth having
                note = f"{type(failure).__name__}: {failure}"[:300]
                ended = {"model": architecture.value, "dtype": dtype.value, "mode": "ended", "error": math.nan}
                yield ended | {"is_right": False, "same_tokens": equal, "note": note}
            for mode, error in errors.items():
                tolerance = ROUNDED_TOLERANCE if _AGAINST_PLAIN in mode else TOLERANCES[dtype]
                is_right = equal and error <= tolerance
                row = {"model": architecture.value, "dtype": dtype.value, "mode": mode, "error": error}
                yield row | {"is_right": is_right, "same_tokens": equal}


@torch.inference_mode()
def _check_batch(bench: Bench, shape: BatchShape, captures: Captures | None, errors: dict[str, float]) -> bool:
    """Keep the largest error per mode; whether all greedy tokens are those of the plain model (in float32).

    In bfloat16, where sizes of products decide how they round, a captured mode is compared with itself uncaptured.
    """
    cache = KVCache.allocate(bench.config, 2048, bench.device)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    step = bench.step(shape, cache)
    is_exact = bench.config.dtype is DType.FLOAT32
    plain = bench.model(step)
    tokens = bench.model.logits(plain).argmax(dim=-1)
    equal = True

    def compare(mode: str, hidden: Tensor, cut: Cut, expected: Tensor) -> None:
        nonlocal equal
        order = torch.from_numpy(cut.positions_of(np.arange(len(step.tokens)))).to(bench.device)
        normed = bench.model.norm(hidden[order])
        difference = ((normed - expected).abs().max() / expected.abs().max()).item()
        errors[mode] = max(errors.get(mode, 0.0), math.inf if math.isnan(difference) else difference)
        if is_exact:
            equal &= torch.equal(bench.model.logits(normed).argmax(dim=-1), tokens)

    for mode, contestant in bench.modes(shape, bench.offered()):
        run = bench.runner(contestant, step)
        cut = contestant.schedule.cut.scaled(step.num_decodes, len(step.tokens) - step.num_decodes)
        order = torch.from_numpy(cut.positions_of(np.arange(len(step.tokens)))).to(bench.device)
        expected = plain if is_exact else bench.model.norm(run()[order])
        if not is_exact and not bench.config.model.num_experts:  # a token may round to other experts
            compare(f"{mode}, {_AGAINST_PLAIN}", run(), cut, plain)
        for _ in range(NUM_REPEATS):
            compare(mode, run(), cut, expected)
        if captures is not None:
            captured = captures.capture(run)
            for _ in range(NUM_REPEATS):
                captured.replay().fill_(math.nan)  # so that the next replay must compute it
                compare(f"{mode}, captured", captured.replay(), cut, expected)
    return equal and _check_padded(bench, shape, captures, errors)


def _check_padded(bench: Bench, shape: BatchShape, captures: Captures | None, errors: dict[str, float]) -> bool:
    """The same of the steps that are served: rows without a token, and of each row said on the device whose it is."""
    if not bench.pipeline.reads_lengths_on_device:
        return True
    cache = KVCache.allocate(bench.config, 2048, bench.device)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    padded = TrialSteps.of(bench.config, bench.pipeline, shape, cache, captures)
    if padded is None:
        return True
    is_exact = bench.config.dtype is DType.FLOAT32
    step = bench.step(shape, cache)
    plain = bench.model(replace(step, tokens=padded.tokens))
    tokens = bench.model.logits(plain).argmax(dim=-1)
    equal = True
    for mode, contestant in bench.modes(shape):
        first: Tensor | None = None
        lanes = bench.pipeline.lanes_on(bench.device).of(overlaps=contestant.overlaps)
        sequential = padded.sequential
        run = sequential if mode == "sequential" else padded.by(contestant.schedule, lanes)
        is_left_out = mode != "sequential" and run.run is sequential.run  # the log says why
        for _ in range(NUM_REPEATS):
            run.fill()
            normed = bench.model.norm(run.run()[run.rows])
            # In bfloat16, where sizes of products decide how they round, with what the same step computed first.
            expected = plain if is_exact else normed if first is None else first
            first = expected
            difference = ((normed - expected).abs().max() / expected.abs().max()).item()
            name = f"{mode}, as served{', but sequentially' if is_left_out else ''}"
            errors[name] = max(errors.get(name, 0.0), math.inf if math.isnan(difference) else difference)
            if is_exact:
                equal &= torch.equal(bench.model.logits(normed).argmax(dim=-1), tokens)
    return equal


def measure_pipeline(
    device: torch.device, schedules: Path | None, seconds_per_trial: float = SECONDS_PER_TRIAL
) -> Iterator[dict[str, Any]]:
    """One row per batch, library of matrix products and schedule. Only cublasLt honours shares of execution units."""
    bench = Bench.of(LARGE_SHAPE, DType.BFLOAT16, device)
    trial = Trial(bench.config, bench.pipeline, TensorParallel())
    planned = list(_planned(bench.pipeline, schedules))
    chosen_before = torch.backends.cuda.preferred_blas_library()
    try:
        for library in ("cublas", "cublaslt"):
            torch.backends.cuda.preferred_blas_library(library)
            for batch_name, batch in LARGE_BATCHES.items():
                contestants = dict(bench.modes(batch, bench.offered() if library == "cublaslt" else ()))
                for name, schedule in planned:
                    if schedule.fits(int(batch.num_decodes), int(batch.num_prefills)):
                        contestants[name] = Contestant(schedule, True)
                yield from _measure_batch(bench, trial, batch_name, batch, library, contestants, seconds_per_trial)
    finally:
        torch.backends.cuda.preferred_blas_library(chosen_before)


def _measure_batch(
    bench: Bench,
    trial: Trial,
    batch_name: str,
    batch: BatchShape,
    library: str,
    contestants: dict[str, Contestant],
    seconds_per_trial: float,
) -> Iterator[dict[str, Any]]:
    timings = trial.run(list(contestants.values()), batch, seconds_per_trial)
    launched = _launched_seconds(bench, batch, list(contestants.values()))
    for (name, _), timing, eager in zip(contestants.items(), timings, launched, strict=True):
        yield {
            "batch": batch_name,
            "library": library,
            "schedule": name,
            "captured_seconds": timing.seconds,
            "launched_seconds": eager,
            "captured_gain": timings[0].seconds / timing.seconds,
            "launched_gain": launched[0] / eager,
            "num_rounds": len(timing.rounds),
        }


@torch.inference_mode()
def _launched_seconds(bench: Bench, batch: BatchShape, contestants: list[Contestant]) -> list[float]:
    """Medians of runs launched operation by operation, as the engine does, going round the contestants."""
    num_tokens = int(batch.num_decodes * batch.decode_context + batch.num_prefills + batch.prefill_context)
    step = bench.step(batch, synthetic_cache(bench.config, num_tokens, bench.device))
    runs = [bench.runner(contestant, step) for contestant in contestants]
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(NUM_REPEATS + 1):
        for run, found in zip(runs, seconds, strict=True):
            clock = StepClock(bench.device)
            run()
            clock.stop()
            if number:  # the first round warms up
                found.append(clock.seconds())
            else:
                clock.seconds()
    return [statistics.median(found) for found in seconds]


def _planned(pipeline: Pipeline, folder: Path | None) -> Iterator[tuple[str, Schedule]]:
    """The schedules of a folder that this model can be run by."""
    for planned in planned_schedules(folder):
        if isinstance(planned, LeftOut):
            print(f"  {planned.name} is left out: {planned.reason}")
            continue
        try:
            pipeline.check(planned.schedule)
        except ConfigError as error:
            print(f"  {planned.name} is left out: {error}")
        else:
            yield planned.title, planned.schedule
