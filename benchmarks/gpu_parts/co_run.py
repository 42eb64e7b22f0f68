"""The part `co-run`: a layer's products and a layer's decode attention at the same time, on two streams.

`sum` is what they take one after the other, each on the whole device, products by cublasLt. Mechanisms: `none`, two
streams, attention first and of high priority; `green`, two parts of the multiprocessors; `coresident`, products that
leave room for an attention program on every multiprocessor. The best joint time decides: beyond 0.93 of the sum, one
device gains too little from overlap to spend more effort on it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_parts.bench_device import BenchDevice
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.ledger import Ledger, Row
from gpu_parts.model_sizes import LLAMA_8B, ModelSizes
from gpu_parts.operands import Decodes, Product, spread_lengths
from gpu_parts.power_log import PowerLog, described
from gpu_parts.timing import Run, Timing

from engine.kernels.gpu import decode_config, gemm_config
from engine.kernels.gpu.gemm_config import GemmConfig
from engine.pipeline.green_partition import GreenPartition, GreenPartitionError

KILL_SHARE = 0.93
NUM_REPEATS = 3
SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class PairGrid:
    """`num_tokens` of the products, a nano-batch's; decodes of (sequences, length); numbers to pair."""

    model: ModelSizes = LLAMA_8B
    num_tokens: int = 1024
    decodes: tuple[int, int] = (512, 1300)
    sms: tuple[int, ...] = (92, 84, 132, 100)
    ctas: tuple[int, ...] = (40, 48, 80, 132, 264)
    parts: tuple[int, ...] = (40, 48, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """The streams of products and of attention."""

    products: Any
    attention: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One way to run both."""

    name: str
    products: Sequence[Run]
    attention: Run
    lanes: Lanes


Fork = Callable[[Pair], Run]


def measure_pairs(
    ledger: Ledger, budget: Budget, bench: BenchDevice, grid: PairGrid | None = None, fork: Fork | None = None
) -> None:
    """`fork` makes of a pair what runs both lanes; tests give one that needs no streams."""
    grid = grid or PairGrid()
    fork = fork or forked
    power = PowerLog(bench.device.index or 0)
    decodes = Decodes.random(spread_lengths(*grid.decodes), grid.model, bench)
    products = [
        Product.random(grid.num_tokens, shape, bench.device, is_fp8=False) for shape in grid.model.products.values()
    ]
    alone = _alone(ledger, bench, decodes, products)
    if alone is None:
        return
    total = sum(alone)
    best: tuple[float, str] | None = None
    for make in _pairs(ledger, bench, grid, decodes, products):
        if not budget.has(3):
            ledger.skip("co-run", "further pairs", NO_TIME)
            break
        pair = make()
        with power.sampled() as readings:
            timing = bench.timer.time({pair.name: [fork(pair)]}, SECONDS)[pair.name]
        if isinstance(timing, Exception):
            ledger.add(Row(group="co-run", name=pair.name, note=f"{type(timing).__name__}: {timing}"[:300]))
            continue
        share = timing.seconds / NUM_REPEATS / total
        note = f"{share:.3f} of the sum {described(readings)}"
        row = Row(
            group="co-run", name=pair.name, value=1e3 * timing.seconds / NUM_REPEATS, unit="ms", note=note,
            details={"share_of_sum": share, "spread": timing.spread, **readings},
        )  # fmt: skip
        ledger.add(row)
        best = min(best or (share, pair.name), (share, pair.name))
    if best is not None:
        ledger.add(criterion(*best))
    if bench.is_cuda:
        _sm_histogram(ledger, bench, grid.parts[0])


def criterion(share: float, name: str) -> Row:
    """The best joint time against what would make overlap worth its while."""
    verdict = "go on with overlap" if share <= KILL_SHARE else "overlap gains too little on this device"
    note = f"{name}; kill criterion {KILL_SHARE}: {verdict}"
    return Row(group="co-run", name="best joint time over the sum", value=share, note=note)


def forked(pair: Pair) -> Run:
    """Attention is launched first: its few long programs must be on the device before the many of a product."""

    def run() -> None:
        current = torch.cuda.current_stream()
        for stream in (pair.lanes.attention, pair.lanes.products):
            stream.wait_stream(current)
        with torch.cuda.stream(pair.lanes.attention):
            for _ in range(NUM_REPEATS):
                pair.attention()
        with torch.cuda.stream(pair.lanes.products):
            for _ in range(NUM_REPEATS):
                for product in pair.products:
                    product()
        for stream in (pair.lanes.attention, pair.lanes.products):
            current.wait_stream(stream)

    return run


def _alone(
    ledger: Ledger, bench: BenchDevice, decodes: Decodes, products: Sequence[Product]
) -> tuple[float, float] | None:
    """Seconds of attention and of the products by cublasLt, each on the whole device; also rows for the persistent
    kernel's, of which the co-resident one is expected to lose some percent.
    """

    def all_of(runs: Sequence[Run]) -> Run:
        return lambda: [run() for run in runs]

    contestants: dict[str, Sequence[Run]] = {
        "attention alone": [decodes.run(2 * bench.num_sms)],
        "products alone, cublasLt": [all_of([product.by_cublaslt(bench, bench.num_sms) for product in products])],
        "products alone, ours": [all_of([product.ours(bench.num_sms) for product in products])],
        "products alone, co-resident": [
            all_of([product.ours(bench.num_sms, gemm_config.CORESIDENT) for product in products])
        ],
        "attention alone, co-resident": [decodes.run(bench.num_sms, decode_config.CORESIDENT)],
    }
    timings = bench.timer.time(contestants, 2 * SECONDS)
    for name, timing in timings.items():
        if isinstance(timing, Timing):
            ledger.add(Row(group="co-run", name=name, value=1e3 * timing.seconds, unit="ms"))
        else:
            ledger.add(Row(group="co-run", name=name, note=f"{type(timing).__name__}: {timing}"[:300]))
    attention, library = timings["attention alone"], timings["products alone, cublasLt"]
    if isinstance(attention, Timing) and isinstance(library, Timing):
        return attention.seconds, library.seconds
    return None


def _pairs(
    ledger: Ledger, bench: BenchDevice, grid: PairGrid, decodes: Decodes, products: Sequence[Product]
) -> Iterator[Callable[[], Pair]]:
    """One of every mechanism first, then the rest of the grid."""
    streams = _streams(bench)

    def cublaslt(sms: int) -> list[Run]:
        return [product.by_cublaslt(bench, sms) for product in products]

    def ours(sms: int, config: GemmConfig | None = None) -> list[Run]:
        return [product.ours(sms, config) for product in products]

    def plain(kind: str, sms: int, ctas: int) -> Callable[[], Pair]:
        make = cublaslt if kind == "cublasLt" else ours
        name = f"none: {kind} {sms} SMs, attention {ctas} CTAs"
        return lambda: Pair(name=name, products=make(sms), attention=decodes.run(ctas), lanes=streams)

    def coresident(ctas: int) -> Callable[[], Pair]:
        return lambda: Pair(
            name=f"coresident: ours {bench.num_sms} SMs, attention {ctas} CTAs",
            products=ours(bench.num_sms, gemm_config.CORESIDENT),
            attention=decodes.run(ctas, decode_config.CORESIDENT),
            lanes=streams,
        )

    sms = [count for count in grid.sms if count <= bench.num_sms]
    yield plain("cublasLt", sms[0], grid.ctas[0])
    yield coresident(bench.num_sms)
    yield plain("ours", sms[0], grid.ctas[0])
    yield from _green_pairs(ledger, bench, grid, decodes, {"cublasLt": cublaslt, "ours": ours})
    for count in sms:
        for ctas in grid.ctas:
            for kind in ("cublasLt", "ours"):
                if (count, ctas) != (sms[0], grid.ctas[0]):
                    yield plain(kind, count, ctas)
    yield coresident(max(1, bench.num_sms // 2))


def _green_pairs(
    ledger: Ledger,
    bench: BenchDevice,
    grid: PairGrid,
    decodes: Decodes,
    makers: dict[str, Callable[[int], list[Run]]],
) -> Iterator[Callable[[], Pair]]:
    """Attention on a part of the device, with one program on each of its multiprocessors and with two."""
    if not bench.is_cuda:
        ledger.skip("co-run", "green", "needs a CUDA device")
        return
    for count in grid.parts:
        try:
            partition = GreenPartition.split(bench.device, count, priorities=(-1, 0))
        except GreenPartitionError as error:
            ledger.skip("co-run", f"green {count} | rest", str(error))
            return
        attention, rest = partition.first, partition.second
        lanes = Lanes(products=rest.stream, attention=attention.stream)
        for kind, make in makers.items():
            for ctas in (2 * attention.num_sms, attention.num_sms):
                name = f"green: {kind} {rest.num_sms} SMs | attention {attention.num_sms} SMs, {ctas} CTAs"

                def pair(
                    name: str = name,
                    make: Callable[[int], list[Run]] = make,
                    num_sms: int = rest.num_sms,
                    ctas: int = ctas,
                    lanes: Lanes = lanes,
                ) -> Pair:
                    return Pair(name=name, products=make(num_sms), attention=decodes.run(ctas), lanes=lanes)

                yield pair


def _streams(bench: BenchDevice) -> Lanes:
    if not bench.is_cuda:
        return Lanes(products=None, attention=None)
    return Lanes(
        products=torch.cuda.Stream(bench.device),  # type: ignore[no-untyped-call]
        attention=torch.cuda.Stream(bench.device, priority=-1),  # type: ignore[no-untyped-call]
    )


def _sm_histogram(ledger: Ledger, bench: BenchDevice, count: int) -> None:
    """On how many multiprocessors the programs of a part's stream ran, launched and replayed from a graph."""
    from gpu_parts.sm_ids import NUM_PROGRAMS, note_sm_ids

    name = f"{count} SMs, programs ran on"
    try:
        partition = GreenPartition.split(bench.device, count)
        seen: dict[str, list[set[int]]] = {"launched": [], "replayed": []}
        for part in (partition.first, partition.second):
            ids = torch.full((NUM_PROGRAMS,), -1, dtype=torch.int32, device=bench.device)
            torch.cuda.synchronize(bench.device)
            with torch.cuda.stream(part.stream):
                note_sm_ids(ids)
            part.stream.synchronize()
            seen["launched"].append(set(ids.tolist()))
            graph = torch.cuda.CUDAGraph()
            current = torch.cuda.Stream(bench.device)  # type: ignore[no-untyped-call]
            with torch.cuda.graph(graph, stream=current, capture_error_mode="thread_local"):
                part.stream.wait_stream(current)
                with torch.cuda.stream(part.stream):
                    note_sm_ids(ids)
                current.wait_stream(part.stream)
            ids.fill_(-1)
            torch.cuda.synchronize(bench.device)
            graph.replay()
            torch.cuda.synchronize(bench.device)
            seen["replayed"].append(set(ids.tolist()))
    except (GreenPartitionError, RuntimeError) as error:
        ledger.skip("green", name, str(error).splitlines()[0][:300])
        return
    for how, (first, second) in seen.items():
        sizes = partition.first.num_sms, partition.second.num_sms
        is_kept = not first & second and len(first) <= sizes[0] and len(second) <= sizes[1]
        note = (
            f"the other part on {len(second)}, {len(first & second)} shared; {'kept' if is_kept else 'NOT KEPT'} apart"
        )
        ledger.add(Row(group="green", name=f"{name}, {how}", value=float(len(first)), unit="SMs", note=note))
