"""The part `ceilings`: what this device gives to matrix products and to reading, in how many multiprocessors.

Products at a layer's four shapes, by cublasLt with a carveout and by the persistent kernel, in bfloat16 and FP8; bytes
read per second against programs, and against multiprocessors where the driver splits them. From the latter follows the
share of multiprocessors that saturates the memory: up to 0.4, a partition can pay; from 0.6 on it hardly can.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_parts.bench_device import BenchDevice
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.ledger import Ledger, Row
from gpu_parts.model_sizes import LLAMA_8B, ModelSizes
from gpu_parts.operands import Product
from gpu_parts.power_log import PowerLog, described
from gpu_parts.rate_rows import rate_rows
from gpu_parts.read_kernel import allocate_source, read_all
from gpu_parts.timing import Run, Timing

from engine.kernels.gpu import gemm_config
from engine.pipeline.green_partition import GreenPartition, GreenPartitionError

READ_BYTES = 2 << 30
SECONDS_PER_GROUP = 0.15
_SATURATED = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class CeilingGrid:
    """What is measured: numbers of tokens and of multiprocessors for products, programs and parts for reading."""

    model: ModelSizes = LLAMA_8B
    tokens: tuple[int, ...] = (2048, 1024, 640, 1280, 512, 256, 128, 768, 1408)
    sms: tuple[int, ...] = (132, 92, 84, 100, 124, 108, 64)
    ctas: tuple[int, ...] = (16, 32, 40, 48, 56, 64, 80, 92, 108, 124, 132, 264)
    parts: tuple[int, ...] = (16, 24, 32, 40, 48, 56, 64, 80, 96)
    read_bytes: int = READ_BYTES


def measure_ceilings(ledger: Ledger, budget: Budget, bench: BenchDevice, grid: CeilingGrid | None = None) -> None:
    """Reading first, which takes a second or two; then products, large batches first."""
    grid = grid or CeilingGrid()
    power = PowerLog(bench.device.index or 0)
    if power.problem is not None:
        ledger.skip("power", "NVML", power.problem)
    _measure_reading(ledger, bench, grid, power)
    _measure_parts(ledger, budget.part(0.1), bench, grid)
    _measure_copy(ledger, bench, grid)
    for num_tokens in grid.tokens:
        for name, shape in grid.model.products.items():
            for is_fp8 in (False, True):
                # Compiling the candidates is most of it the first time, and found in Triton's cache later.
                if not budget.has(8.0 if num_tokens == grid.tokens[0] else 3.0):
                    ledger.skip("product", f"{name} M={num_tokens} {'fp8' if is_fp8 else 'bf16'}", NO_TIME)
                    continue
                _measure_product(ledger, bench, grid, power, num_tokens, name, shape, is_fp8=is_fp8)


def read_ceiling(bench: BenchDevice, num_bytes: int = READ_BYTES) -> float:
    """Bytes per second that two programs on every multiprocessor read; takes a second."""
    runs = _readers(bench, num_bytes, 2 * bench.num_sms)
    return num_bytes / _seconds(bench.timer.time({"read": runs}, SECONDS_PER_GROUP)["read"])


def product_ceiling(bench: BenchDevice, model: ModelSizes, num_tokens: int = 2048, *, is_fp8: bool = False) -> float:
    """Flops per second of the best of the layer's four shapes by the library; takes a few seconds."""
    best = 0.0
    for shape in model.products.values():
        products = bench.rotated(
            partial(Product.random, num_tokens, shape, bench.device, is_fp8=is_fp8),
            Product.num_bytes(num_tokens, shape, is_fp8=is_fp8),
            most=4,
        )
        runs = [product.by_cublaslt(bench, bench.num_sms) for product in products]
        seconds = _seconds(bench.timer.time({"library": runs}, SECONDS_PER_GROUP)["library"])
        best = max(best, 2 * num_tokens * shape[0] * shape[1] / seconds)
    return best


def saturating_share(rates: dict[int, float], total: int) -> float:
    """The smallest share of `total` whose rate is within 5 % of the best."""
    best = max(rates.values())
    return min(count for count, rate in rates.items() if rate >= _SATURATED * best) / total


def _seconds(timing: Timing | Exception) -> float:
    if isinstance(timing, Exception):
        raise timing
    return timing.seconds


def _readers(bench: BenchDevice, num_bytes: int, num_ctas: int) -> list[Run]:
    """One buffer, far larger than the L2."""
    source = allocate_source(num_bytes, bench.device)
    sums = torch.empty(num_ctas, dtype=torch.int32, device=bench.device)
    return [partial(read_all, source, sums, num_ctas)]


def _measure_reading(ledger: Ledger, bench: BenchDevice, grid: CeilingGrid, power: PowerLog) -> None:
    source = allocate_source(grid.read_bytes, bench.device)
    sums = torch.empty(max(grid.ctas), dtype=torch.int32, device=bench.device)
    num_bytes = 4 * source.numel()
    contestants: dict[str, Sequence[Run]] = {
        f"{ctas} CTAs": [partial(read_all, source, sums, ctas)] for ctas in grid.ctas
    }
    with power.sampled() as readings:
        timings = bench.timer.time(contestants, 0.1 * len(contestants))
    rates = rate_rows(ledger, "read", timings, num_bytes / 1e9, "GB/s", None)
    by_ctas = {ctas: rates[f"{ctas} CTAs"] for ctas in grid.ctas if f"{ctas} CTAs" in rates}
    few = {ctas: rate for ctas, rate in by_ctas.items() if ctas <= bench.num_sms}
    if few:
        share = saturating_share(few, bench.num_sms)
        note = f"of one program each; {described(readings)}"
        ledger.add(Row(group="read", name="share of SMs that saturates (p_sat)", value=share, unit="", note=note))


def _measure_parts(ledger: Ledger, budget: Budget, bench: BenchDevice, grid: CeilingGrid) -> None:
    """On parts of the device: three programs for each multiprocessor of the part."""
    if not bench.is_cuda:
        ledger.skip("read", "by parts of the device", "needs a CUDA device")
        return
    source = allocate_source(grid.read_bytes, bench.device)
    sums = torch.empty(4 * bench.num_sms, dtype=torch.int32, device=bench.device)
    rates: dict[int, float] = {}
    for count in grid.parts:
        if not budget.has(0.5):
            ledger.skip("read", f"{count} SMs, green", NO_TIME)
            continue
        try:
            part = GreenPartition.split(bench.device, count).first
            seconds = eager_seconds(part.stream, partial(read_all, source, sums, 2 * part.num_sms))
        except (GreenPartitionError, RuntimeError) as error:
            ledger.skip("read", f"{count} SMs, green", str(error).splitlines()[0])
            return
        rates[part.num_sms] = 4 * source.numel() / seconds / 1e9
        ledger.add(Row(group="read", name=f"{part.num_sms} SMs, green", value=rates[part.num_sms], unit="GB/s"))
    if rates:
        share = saturating_share(rates, bench.num_sms)
        ledger.add(Row(group="read", name="share of SMs that saturates, green (p_sat)", value=share))


def eager_seconds(stream: Any, run: Run, num_runs: int = 5) -> float:
    """The median of launches on a stream; for kernels long enough that launching does not show."""
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        marks = []
        for _ in range(num_runs):
            begun = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begun.record(stream)
            run()
            ended.record(stream)
            marks.append((begun, ended))
        stream.synchronize()
    return float(sorted(begun.elapsed_time(ended) for begun, ended in marks)[num_runs // 2]) / 1e3


def _measure_copy(ledger: Ledger, bench: BenchDevice, grid: CeilingGrid) -> None:
    source = allocate_source(grid.read_bytes // 2, bench.device)
    target = torch.empty_like(source)
    timings = bench.timer.time({"copy, read and written": [partial(target.copy_, source)]}, SECONDS_PER_GROUP)
    rate_rows(ledger, "read", timings, 2 * 4 * source.numel() / 1e9, "GB/s", None)


def _measure_product(
    ledger: Ledger,
    bench: BenchDevice,
    grid: CeilingGrid,
    power: PowerLog,
    num_tokens: int,
    name: str,
    shape: tuple[int, int],
    *,
    is_fp8: bool,
) -> None:
    """All numbers of multiprocessors and all candidates of one shape in turns."""
    products = bench.rotated(
        partial(Product.random, num_tokens, shape, bench.device, is_fp8=is_fp8),
        Product.num_bytes(num_tokens, shape, is_fp8=is_fp8),
        most=4,
    )
    contestants: dict[str, Sequence[Run]] = {}
    for sms in [count for count in grid.sms if count <= bench.num_sms]:
        contestants[f"cublasLt {sms} SMs"] = [product.by_cublaslt(bench, sms) for product in products]
        contestants[f"ours {sms} SMs"] = [product.ours(sms) for product in products]
    if num_tokens in grid.tokens[:2]:
        for config in (*gemm_config.CANDIDATES, gemm_config.CORESIDENT):
            key = f"ours {bench.num_sms} SMs {config.rows}x{config.columns}x{config.num_stages}"
            contestants[key] = [product.ours(bench.num_sms, config) for product in products]
    with power.sampled() as readings:
        timings = bench.timer.time(contestants, SECONDS_PER_GROUP)
    tera = 2 * num_tokens * shape[0] * shape[1] / 1e12
    kind = "fp8" if is_fp8 else "bf16"
    named = {f"{name} M={num_tokens} {kind} {key}": timing for key, timing in timings.items()}
    first = next(iter(named))
    whole = named[first]
    ceiling = tera / whole.seconds if isinstance(whole, Timing) else None
    shown: set[str] = set()
    if num_tokens in grid.tokens[:2]:
        shown = {f"{name} M={num_tokens} {kind} {library} {bench.num_sms} SMs" for library in ("cublasLt", "ours")}
    rate_rows(
        ledger, "product", named, tera, "TFLOP/s", ceiling, note=described(readings), is_shown=lambda key: key in shown
    )
