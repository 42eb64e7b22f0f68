"""The part `kernels-fast`: every kernel at the sizes of a layer, as a rate and a share of the ceiling of this run.

Kernels that memory bounds, in bytes that they must move at least per second; decode attention for numbers of programs
and candidates; prefill attention and experts in flops per second; drawing tokens in milliseconds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from gpu_parts.attention_checks import decode_candidates, described
from gpu_parts.bench_device import BenchDevice
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.ceilings import READ_BYTES, product_ceiling, read_ceiling
from gpu_parts.ledger import Ledger, Row
from gpu_parts.model_sizes import LLAMA_8B, MIXTRAL, QWEN3_30B, ExpertSizes, ModelSizes
from gpu_parts.operands import Decodes, spread_lengths
from gpu_parts.random_cache import RandomCache
from gpu_parts.rate_rows import rate_rows
from gpu_parts.timing import Run, Timing
from torch import Tensor

from engine.kernels.gpu import prefill_config
from engine.kernels.gpu.activation import silu_mul, silu_mul_fp8
from engine.kernels.gpu.all_reduce_add import add_partials
from engine.kernels.gpu.embedding import embedding
from engine.kernels.gpu.mixture_of_experts import expert_flops, mixture_of_experts
from engine.kernels.gpu.norm import add_rms_norm, add_rms_norm_fp8, rms_norm
from engine.kernels.gpu.prefill_attention import prefill_attention, prefill_flops
from engine.kernels.gpu.quantise import quantise_rows
from engine.kernels.gpu.rotary import rotate_and_write
from engine.kernels.gpu.sampling import best_tokens, draw_tokens

SECONDS = 0.2
_NUM_BEST = 3  # of all candidates, in the table


@dataclass(frozen=True, slots=True, kw_only=True)
class FastGrid:
    """The batches. `decodes` are (sequences, tokens of each); `prefills` lists of (chunk, context) of one call."""

    model: ModelSizes = LLAMA_8B
    num_tokens: int = 2048
    num_drawn: int = 1024
    decodes: tuple[tuple[int, int], ...] = ((512, 1300), (677, 1280), (1024, 768), (1024, 500))
    ctas: tuple[int, ...] = (264, 132, 40, 66, 92, 48)
    prefills: tuple[tuple[tuple[int, int], ...], ...] = (
        ((1024, 1024),) * 2, ((1355, 1355),), ((512, 2048),) * 4, ((4096, 4096),),
    )  # fmt: skip
    experts: tuple[tuple[ExpertSizes, int], ...] = (
        (MIXTRAL, 2048), (QWEN3_30B, 2048), (MIXTRAL, 256), (QWEN3_30B, 256),
    )  # fmt: skip
    read_bytes: int = READ_BYTES


def measure_kernels(ledger: Ledger, budget: Budget, bench: BenchDevice, grid: FastGrid | None = None) -> None:
    """Attention of decodes first: it and the products are most of a step."""
    grid = grid or FastGrid()
    reads = read_ceiling(bench, grid.read_bytes)
    products = product_ceiling(bench, grid.model, grid.num_tokens)
    ledger.add(Row(group="ceiling", name="read", value=reads / 1e9, unit="GB/s"))
    ledger.add(Row(group="ceiling", name="bf16 product", value=products / 1e12, unit="TFLOP/s"))
    stages: tuple[tuple[str, float, Callable[[], None]], ...] = (
        ("decode attention", 25, partial(_decodes, ledger, budget, bench, grid, reads)),
        ("prefill attention", 15, partial(_prefills, ledger, budget, bench, grid, products)),
        ("memory", 5, partial(_memory_bound, ledger, bench, grid, reads)),
        ("sampling", 5, partial(_sampling, ledger, bench, grid, reads)),
        ("experts", 15, partial(_experts, ledger, budget, bench, grid, products)),
        ("decode choices", 30, partial(_decode_choices, ledger, budget, bench, grid, reads)),
    )
    for name, seconds, stage in stages:
        if not budget.has(seconds / 3):
            ledger.skip(name, "all", NO_TIME)
            continue
        try:
            stage()
        except Exception as error:  # one stage's failure leaves the others their time
            ledger.add(Row(group=name, name="all", is_right=False, note=f"{type(error).__name__}: {error}"[:300]))


def _decodes(ledger: Ledger, budget: Budget, bench: BenchDevice, grid: FastGrid, ceiling: float) -> None:
    """The chosen configuration at every number of programs; lengths spread by a quarter around the one named."""
    for num_sequences, length in grid.decodes:
        for is_fp8 in (False, True):
            if not budget.has(3):
                ledger.skip("decode attention", f"{num_sequences} x {length}", NO_TIME)
                continue
            decodes = Decodes.random(spread_lengths(num_sequences, length), grid.model, bench, is_fp8=is_fp8)
            kind = "fp8" if is_fp8 else "bf16"
            contestants = {f"{num_sequences} x {length} {kind} {ctas} CTAs": [decodes.run(ctas)] for ctas in grid.ctas}
            timings = bench.timer.time(contestants, SECONDS * 2)
            shown = tuple(f" {ctas} CTAs" for ctas in grid.ctas[:3])
            rate_rows(
                ledger, "decode attention", timings, decodes.num_bytes / 1e12, "TB/s", ceiling / 1e12,
                is_shown=lambda name, shown=shown: name.endswith(shown),  # type: ignore[misc]
            )  # fmt: skip


def _decode_choices(ledger: Ledger, budget: Budget, bench: BenchDevice, grid: FastGrid, ceiling: float) -> None:
    """Every candidate at one batch, alone on every multiprocessor and two on each."""
    num_sequences, length = grid.decodes[0]
    model = grid.model
    decodes = Decodes.random(spread_lengths(num_sequences, length), model, bench)
    rates: dict[str, float] = {}
    for config in decode_candidates(model.num_heads // model.num_kv_heads, model.head_dim):
        if not budget.has(5):
            ledger.skip("decode choices", described(config), NO_TIME)
            continue
        contestants = {
            f"{described(config)} {ctas} CTAs": [decodes.run(ctas, config)]
            for ctas in (bench.num_sms, 2 * bench.num_sms)
        }
        timings = bench.timer.time(contestants, SECONDS)
        rates |= rate_rows(
            ledger, "decode choices", timings, decodes.num_bytes / 1e12, "TB/s", ceiling / 1e12,
            is_shown=lambda name: False,
        )  # fmt: skip
    for name in sorted(rates, key=lambda name: -rates[name])[:_NUM_BEST]:
        ledger.add(Row(group="decode choices", name=name, value=rates[name], unit="TB/s", ceiling=ceiling / 1e12))


def _prefills(ledger: Ledger, budget: Budget, bench: BenchDevice, grid: FastGrid, ceiling: float) -> None:
    """Every candidate of the model's head dimension."""
    model = grid.model
    for chunks in grid.prefills:
        if not budget.has(4):
            ledger.skip("prefill", str(chunks), NO_TIME)
            continue
        sizes, lengths = [size for size, _ in chunks], [length for _, length in chunks]
        cache = RandomCache.of(
            lengths, num_kv_heads=model.num_kv_heads, block_size=model.block_size, head_dim=model.head_dim,
            dtype=torch.bfloat16, device=bench.device,
        )  # fmt: skip
        query = _random(sum(sizes), model.num_heads, model.head_dim, bench=bench)
        starts = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=bench.device)
        width = next(width for width in prefill_config.CANDIDATES if model.head_dim <= width)
        output = torch.empty_like(query)
        name = f"{len(chunks)} x {sizes[0]} of {lengths[0]}"
        contestants: dict[str, Sequence[Run]] = {
            f"{name} {described(config)}": [
                partial(
                    prefill_attention, query, cache.keys, cache.values, cache.block_tables, starts, cache.lengths,
                    scale=model.head_dim**-0.5, output=output, config=config,
                )
            ]
            for config in prefill_config.CANDIDATES[width]
        }  # fmt: skip
        flops = prefill_flops(sizes, lengths, num_heads=model.num_heads, head_dim=model.head_dim)
        timings = bench.timer.time(contestants, SECONDS)
        rate_rows(ledger, "prefill", timings, flops / 1e12, "TFLOP/s", ceiling / 1e12)


def _random(*shape: int, bench: BenchDevice) -> Tensor:
    return torch.randn(shape, device=bench.device, dtype=torch.bfloat16)


def _memory_bound(ledger: Ledger, bench: BenchDevice, grid: FastGrid, ceiling: float) -> None:
    """Bytes are counted once for every input and output, whatever a kernel really reads."""
    for name, num_bytes, make in _memory_kernels(bench, grid):
        runs = bench.rotated(make, num_bytes)
        timings = bench.timer.time({name: runs}, SECONDS / 2)
        rate_rows(ledger, "memory", timings, num_bytes / 1e9, "GB/s", ceiling / 1e9)


def _memory_kernels(bench: BenchDevice, grid: FastGrid) -> Iterator[tuple[str, int, Callable[[], Run]]]:
    """Name, bytes of a call, and what makes a call with inputs of its own."""
    num_tokens, hidden, width = grid.num_tokens, grid.model.hidden, grid.model.intermediate
    small, wide = num_tokens * hidden, num_tokens * width
    weight = _random(hidden, bench=bench)
    rows, gates = (
        partial(_random, num_tokens, hidden, bench=bench),
        partial(_random, num_tokens, 2 * width, bench=bench),
    )

    def buffers(columns: int) -> tuple[Tensor, Tensor]:
        values = torch.empty(num_tokens, columns, dtype=torch.float8_e4m3fn, device=bench.device)
        return values, torch.empty(num_tokens, device=bench.device)

    yield "rms_norm", 4 * small, lambda: partial(rms_norm, rows(), weight, 1e-5, rows())
    yield "add_rms_norm", 8 * small, lambda: partial(add_rms_norm, rows(), rows(), weight, 1e-5, rows())
    yield (
        "add_rms_norm_fp8", 7 * small,
        lambda: partial(add_rms_norm_fp8, rows(), rows(), weight, 1e-5, *buffers(hidden)),
    )  # fmt: skip
    yield "silu_mul", 6 * wide, lambda: partial(silu_mul, gates(), _random(num_tokens, width, bench=bench))
    yield "silu_mul_fp8", 5 * wide, lambda: partial(silu_mul_fp8, gates(), *buffers(width))
    yield "quantise_rows", 3 * small, lambda: partial(quantise_rows, rows(), *buffers(hidden))
    yield "add_partials, 2 ranks", 6 * small, lambda: partial(add_partials, [rows(), rows()], rows())
    vocabulary = min(grid.model.vocabulary, 32768)
    table = _random(vocabulary, hidden, bench=bench)
    yield (
        "embedding", 4 * small,
        lambda: partial(embedding, torch.randint(0, vocabulary, (num_tokens,), device=bench.device), table, 0, rows()),
    )  # fmt: skip
    yield "rotate_and_write", *_rotary(bench, grid)


def _rotary(bench: BenchDevice, grid: FastGrid) -> tuple[int, Callable[[], Run]]:
    model, num_tokens, device = grid.model, grid.num_tokens, bench.device
    num_columns = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    num_blocks = -(-num_tokens // model.block_size)
    angles = torch.rand(4096, model.head_dim, device=device)

    def make() -> Run:
        shape = num_blocks, model.num_kv_heads, model.block_size, model.head_dim
        return partial(
            rotate_and_write,
            _random(num_tokens, num_columns, bench=bench),
            torch.randint(0, 4096, (num_tokens,), device=device),
            torch.randperm(num_blocks * model.block_size, device=device)[:num_tokens],
            _random(*shape, bench=bench),
            _random(*shape, bench=bench),
            angles,
            num_heads=model.num_heads,
            query_THd=_random(num_tokens, model.num_heads, model.head_dim, bench=bench),
        )

    return 2 * 2 * num_tokens * num_columns + 4 * num_tokens * model.head_dim, make


def _sampling(ledger: Ledger, bench: BenchDevice, grid: FastGrid, ceiling: float) -> None:
    """Milliseconds of a step's draws; the ceiling is one pass over the logits."""
    num_rows, device = grid.num_drawn, bench.device
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randn(num_rows, grid.model.vocabulary, device=device, dtype=dtype) * 3
        seeds = torch.randint(0, 2**40, (num_rows,), device=device)
        temperatures = torch.full((num_rows,), 0.8, dtype=torch.float64, device=device)
        output = torch.empty(num_rows, dtype=torch.int64, device=device)
        draw = partial(draw_tokens, logits, seeds, seeds, temperatures, output_K=output)
        top_k = torch.full((num_rows,), 50, device=device)
        top_p = torch.full((num_rows,), 0.95, dtype=torch.float64, device=device)
        kind = "bf16" if dtype is torch.bfloat16 else "fp32"
        contestants: dict[str, Sequence[Run]] = {
            f"{num_rows} rows {kind} best": [partial(best_tokens, logits, output)],
            f"{num_rows} rows {kind} drawn": [draw],
            f"{num_rows} rows {kind} top-p": [partial(draw, top_p_K=top_p)],
            f"{num_rows} rows {kind} top-k and top-p": [partial(draw, top_k_K=top_k, top_p_K=top_p)],
        }
        one_pass = 1e3 * logits.numel() * logits.element_size() / ceiling
        for name, timing in bench.timer.time(contestants, SECONDS * 2).items():
            if isinstance(timing, Timing):
                note = f"one pass over the logits is {one_pass:.3f} ms"
                ledger.add(Row(group="sampling", name=name, value=1e3 * timing.seconds, unit="ms", note=note))
            else:
                ledger.add(Row(group="sampling", name=name, note=f"{type(timing).__name__}: {timing}"[:300]))


def _experts(ledger: Ledger, budget: Budget, bench: BenchDevice, grid: FastGrid, ceiling: float) -> None:
    """Routing, both grouped products and the sum; tokens are routed at random."""
    for sizes, num_tokens in grid.experts:
        name = f"{sizes.name} {num_tokens} tokens"
        if not budget.has(5):
            ledger.skip("experts", name, NO_TIME)
            continue
        hidden = _random(num_tokens, sizes.hidden, bench=bench)
        logits = torch.randn(num_tokens, sizes.num_experts, device=bench.device)
        gate_up = _random(sizes.num_experts, 2 * sizes.intermediate, sizes.hidden, bench=bench) / sizes.hidden**0.5
        down = _random(sizes.num_experts, sizes.hidden, sizes.intermediate, bench=bench) / sizes.intermediate**0.5
        run = partial(
            mixture_of_experts, hidden, logits, gate_up, down, sizes.num_choices, normalise=True, round_scores=False,
            num_sms=bench.num_sms, output=torch.empty_like(hidden),
        )  # fmt: skip
        flops = expert_flops(num_tokens, sizes.num_choices, sizes.hidden, sizes.intermediate)
        timings = bench.timer.time({name: [run]}, SECONDS)
        rate_rows(ledger, "experts", timings, flops / 1e12, "TFLOP/s", ceiling / 1e12)
