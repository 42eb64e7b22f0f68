"""`GemmPeak`: the floating-point operations per second that this device really reaches in a matrix product.

Method: for each of several shapes (large squares, and the model's own projections at a full batch) time `linear` as
the model calls it, `activations [M, K] x weights [N, K]`, repeatedly after a warm-up, and take the median; the peak is
the best median over the shapes. Weights and activations are random, because constant data lets some chips clock
higher. On a GPU a sample is a run of products, each with other weights than the one before, as layers are: a device
that is idle between two of them clocks higher than it does in service. A data sheet's figure is not used anywhere.

`quick` is for the start of a served rank: for a shorter time and, on a CPU, of smaller products, of which the fastest
repetition is taken instead of the median: of a few, and with neighbours still loading, that is what noise cannot make
too small.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional

from engine.config import DeviceKind, EngineConfig
from engine.kernels import packed
from engine.kernels.row_scales import quantise_rows_reference

Shape = tuple[int, int, int]

METHOD = "best over shapes of the median time of linear(x [M, K], w [N, K]), random data, after a warm-up"
SQUARES = {DeviceKind.CPU: (1024, 2048), DeviceKind.CUDA: (4096, 8192)}
SECONDS_PER_SHAPE = 0.4
MIN_REPETITIONS, MAX_REPETITIONS = 5, 200
QUICK_SQUARES = {DeviceKind.CPU: (768,), DeviceKind.CUDA: (4096, 8192)}
QUICK_SECONDS_PER_SHAPE = 0.08
# A GPU has reached the clock that it can hold after some tenths of a second.
CUDA_SECONDS_PER_SHAPE, QUICK_CUDA_SECONDS_PER_SHAPE = 0.6, 0.3
CUDA_RUN_SECONDS = 0.01
CUDA_WEIGHT_BYTES, MAX_CUDA_WEIGHTS = 1 << 28, 16  # several times what stays near the processors
QUICK_CPU_PRODUCTS = 1 << 29  # multiplications of one repetition, at most: some milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmPeak:
    """Floating-point operations per second of the best shape (M, N, K), and of every shape that was tried.

    `dense_flops_per_second` is what the model's own shapes reach together at the dense batch. Where those are in FP8,
    `wide_flops_per_second` is the peak in the activations' format, in which the output head is, else None.
    """

    flops_per_second: float
    shape: Shape
    by_shape: dict[Shape, float]
    dense_flops_per_second: float
    num_threads: int
    wide_flops_per_second: float | None = None


def measure_gemm_peak(config: EngineConfig, *, quick: bool = False) -> GemmPeak:
    """Takes a few seconds, or about half a second if `quick`.

    Uses the number formats, device and CPU threads that a rank of this engine computes with; FP8 on a GPU only, where
    it is the product alone that is timed, of numbers quantised before.
    """
    of_squares = _squares(QUICK_SQUARES if quick else SQUARES, config)
    of_model = model_shapes(config)
    if quick and config.device is DeviceKind.CPU:
        of_model = tuple(_smaller(shape) for shape in of_model)
    device = torch.device(config.device.value)
    dtype = getattr(torch, config.dtype.value)
    with using_threads(config.threads_per_rank), torch.inference_mode():
        in_fp8 = config.in_fp8 and device.type == "cuda"
        by_shape = {
            shape: linear_flops_per_second(shape, dtype, device, quick, in_fp8=in_fp8)
            for shape in (*of_squares, *of_model)
        }
        wide = [linear_flops_per_second(shape, dtype, device, quick) for shape in of_squares] if in_fp8 else []
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what this took must not lessen the memory that a cache of KV blocks finds free
    best = max(by_shape, key=lambda shape: by_shape[shape])
    num_products = {shape: math.prod(shape) for shape in of_model}
    return GemmPeak(
        flops_per_second=by_shape[best],
        shape=best,
        by_shape=by_shape,
        dense_flops_per_second=sum(num_products.values())
        / sum(products / by_shape[shape] for shape, products in num_products.items()),
        num_threads=config.threads_per_rank,
        wide_flops_per_second=max(wide, default=None),
    )


def gemm_shapes(config: EngineConfig) -> tuple[Shape, ...]:
    """(M, N, K) of the products tried: squares that fill the device, then the model's."""
    return (*_squares(SQUARES, config), *model_shapes(config))


def model_shapes(config: EngineConfig) -> tuple[Shape, ...]:
    """(M, N, K) of a layer's large products, with M = the dense batch."""
    model, batch = config.model, config.max_batch_tokens
    feed_forward = model.moe_intermediate_size or model.intermediate_size
    queries = model.num_heads * model.head_dim
    return (
        (batch, queries + 2 * model.num_kv_heads * model.head_dim, model.hidden_size),
        (batch, 2 * feed_forward, model.hidden_size),
        (batch, model.hidden_size, feed_forward),
    )


def _squares(sizes: Mapping[DeviceKind, tuple[int, ...]], config: EngineConfig) -> tuple[Shape, ...]:
    return tuple((size, size, size) for size in sizes[config.device])


def _smaller(shape: Shape) -> Shape:
    """`shape`, its largest sides halved until it is quick on a CPU."""
    sides = list(shape)
    while math.prod(sides) > QUICK_CPU_PRODUCTS:
        sides[sides.index(max(sides))] //= 2
    return sides[0], sides[1], sides[2]


def linear_flops_per_second(
    shape: Shape, dtype: torch.dtype, device: torch.device, quick: bool = False, *, in_fp8: bool = False
) -> float:
    """Of one product (M, N, K), with the threads that torch has now. `in_fp8`: the result alone is of `dtype`."""
    rows, outputs, inputs = shape
    activations = torch.randn(rows, inputs, device=device).to(dtype)

    def product() -> Callable[[], Tensor]:
        weights = torch.randn(outputs, inputs, device=device).to(dtype)
        return _fp8_product(activations, weights) if in_fp8 else _product(activations, weights)

    num_products = 2 * rows * outputs * inputs
    if device.type == "cuda":
        weight_bytes = outputs * inputs * (1 if in_fp8 else dtype.itemsize)
        products = [product() for _ in range(min(MAX_CUDA_WEIGHTS, 1 + CUDA_WEIGHT_BYTES // weight_bytes))]
        seconds = QUICK_CUDA_SECONDS_PER_SHAPE if quick else CUDA_SECONDS_PER_SHAPE
        return num_products / statistics.median(cuda_samples(products, seconds))
    one = product()
    samples = _samples(lambda: _cpu_seconds(one), QUICK_SECONDS_PER_SHAPE if quick else SECONDS_PER_SHAPE)
    return num_products / (min(samples) if quick else statistics.median(samples))


def _samples(time_once: Callable[[], float], seconds: float) -> list[float]:
    for _ in range(2):
        time_once()
    samples: list[float] = []
    while len(samples) < MIN_REPETITIONS or (sum(samples) < seconds and len(samples) < MAX_REPETITIONS):
        samples.append(time_once())
    return samples


def _product(activations: Tensor, weights: Tensor) -> Callable[[], Tensor]:
    """As `Linear` computes it."""
    if packed.can_pack(weights):
        weights = packed.pack(weights)
        return lambda: packed.product(activations, weights, None)
    return lambda: functional.linear(activations, weights)


def _fp8_product(activations: Tensor, weights: Tensor) -> Callable[[], Tensor]:
    """As `engine.kernels.fp8_product` computes it once the activations are quantised."""
    from engine.kernels.gpu.scaled_gemm import scaled_gemm

    values, scales = quantise_rows_reference(activations)
    weight_values, weight_scales = quantise_rows_reference(weights)
    output = activations.new_empty(len(activations), len(weights))
    return lambda: scaled_gemm(values, scales, weight_values, weight_scales, output=output)


def _cpu_seconds(product: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    product()
    return time.perf_counter() - started


def cuda_samples(products: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Seconds of a product, in runs of about `CUDA_RUN_SECONDS` that take about so long together, one product after the
    other of those given.
    """
    following = cycle(products)
    stream = torch.cuda.current_stream()

    def run(count: int) -> float:
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        started.record(stream)
        for _ in range(count):
            next(following)()
        ended.record(stream)
        ended.synchronize()
        return float(started.elapsed_time(ended)) / 1000

    run(len(products))
    estimate = run(len(products)) / len(products)
    count = max(1, math.ceil(CUDA_RUN_SECONDS / estimate))
    num_runs = max(MIN_REPETITIONS, math.ceil(seconds / (count * estimate)))
    return [run(count) / count for _ in range(num_runs)]


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch compute on so many CPU threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
