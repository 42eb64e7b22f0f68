"""`GemmPeak`: the floating-point operations per second that this device really reaches in a matrix product.

Method: for each of several shapes (large squares, and the model's own projections at a full batch) time `linear` as
the model calls it, `activations [M, K] x weights [N, K]`, repeatedly after a warm-up, and take the median; the peak is
the best median over the shapes. Weights and activations are random, because constant data lets some chips clock
higher. A data sheet's figure is not used anywhere.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.config import DeviceKind, EngineConfig

Shape = tuple[int, int, int]

METHOD = "best over shapes of the median time of linear(x [M, K], w [N, K]), random data, after a warm-up"
SQUARES = {DeviceKind.CPU: (1024, 2048), DeviceKind.CUDA: (4096, 8192)}
SECONDS_PER_SHAPE = 0.4
MIN_REPETITIONS, MAX_REPETITIONS = 5, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmPeak:
    """Floating-point operations per second of the best shape (M, N, K), and of every shape that was tried."""

    flops_per_second: float
    shape: Shape
    by_shape: dict[Shape, float]
    num_threads: int


def measure_gemm_peak(config: EngineConfig) -> GemmPeak:
    """Takes a few seconds. Uses the dtype, device and CPU threads that a rank of this engine computes with."""
    device = torch.device(config.device.value)
    dtype = getattr(torch, config.dtype.value)
    with _threads(config.threads_per_rank), torch.inference_mode():
        by_shape = {shape: _flops_per_second(shape, dtype, device) for shape in gemm_shapes(config)}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what this took must not lessen the memory that a cache of KV blocks finds free
    best = max(by_shape, key=lambda shape: by_shape[shape])
    return GemmPeak(flops_per_second=by_shape[best], shape=best, by_shape=by_shape, num_threads=config.threads_per_rank)


def gemm_shapes(config: EngineConfig) -> tuple[Shape, ...]:
    """(M, N, K) of the products tried: squares that fill the device, then the model's with M = the dense batch."""
    model, batch = config.model, config.max_batch_tokens
    feed_forward = model.moe_intermediate_size or model.intermediate_size
    queries = model.num_heads * model.head_dim
    return (
        *((size, size, size) for size in SQUARES[config.device]),
        (batch, queries + 2 * model.num_kv_heads * model.head_dim, model.hidden_size),
        (batch, 2 * feed_forward, model.hidden_size),
        (batch, model.hidden_size, feed_forward),
    )


def _flops_per_second(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    rows, outputs, inputs = shape
    activations = torch.randn(rows, inputs, device=device).to(dtype)
    weights = torch.randn(outputs, inputs, device=device).to(dtype)
    time_once = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    return 2 * rows * outputs * inputs / _median_seconds(lambda: time_once(activations, weights))


def _median_seconds(time_once: Callable[[], float]) -> float:
    for _ in range(2):
        time_once()
    samples: list[float] = []
    while len(samples) < MIN_REPETITIONS or (sum(samples) < SECONDS_PER_SHAPE and len(samples) < MAX_REPETITIONS):
        samples.append(time_once())
    return statistics.median(samples)


def _cpu_seconds(activations: Tensor, weights: Tensor) -> float:
    started = time.perf_counter()
    functional.linear(activations, weights)
    return time.perf_counter() - started


def _cuda_seconds(activations: Tensor, weights: Tensor) -> float:
    stream = torch.cuda.current_stream()
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    stream.record_event(started)
    functional.linear(activations, weights)
    stream.record_event(ended)
    ended.synchronize()
    return float(started.elapsed_time(ended)) / 1000


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
