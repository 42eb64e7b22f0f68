"""Paged attention in plain torch: the candidates that were tried, on the shapes that decide; prints two tables.

    python benchmarks/attention.py [--threads 1] [--rounds 7] [--cpu-time] [--quick] [--dtypes float16]

Rounds are interleaved and medians reported, in milliseconds per layer. `--cpu-time` counts the thread's own CPU time
instead of the wall clock: the only usable clock on a machine that others use too (one thread only). "read" is the
bandwidth bound: reading as many bytes as the keys and values have, once, from contiguous memory. Every candidate's
output is checked against the first's. docs/cpu_attention.md holds what these tables decided.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.host_memory import keep_freed_memory
from engine.kernels import reference

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Heads of one layer and its number format."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads} d{self.head_dim} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A paged cache with sequences in shuffled blocks, and the queries of their last `chunk` tokens each."""

    query: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor
    lengths: Tensor
    chunk: int

    @property
    def scale(self) -> float:
        """1 / sqrt(d)."""
        return float(self.keys.shape[-1] ** -0.5)

    @property
    def max_length(self) -> int:
        """The longest context."""
        return int(self.lengths.max())


def make_case(shape: Shape, lengths: Tensor, chunk: int = 1) -> Case:
    """Random keys, values and queries."""
    num_blocks = (lengths + BLOCK_SIZE - 1) // BLOCK_SIZE
    total = int(num_blocks.sum())
    shuffled = torch.randperm(total)
    tables = torch.zeros(len(lengths), int(num_blocks.max()), dtype=torch.int64)
    tables[torch.arange(tables.shape[1]) < num_blocks[:, None]] = shuffled
    cache = (total, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
    return Case(
        query=torch.randn(len(lengths) * chunk, shape.num_heads, shape.head_dim).to(shape.dtype),
        keys=torch.randn(cache).to(shape.dtype),
        values=torch.randn(cache).to(shape.dtype),
        tables=tables,
        lengths=lengths,
        chunk=chunk,
    )


def gather(cache: Tensor, tables: Tensor) -> Tensor:
    """[D, K, L, d], in the cache's own type."""
    num_kv_heads, block_size, head_dim = cache.shape[1:]
    tiles = tables[:, None, :] * num_kv_heads + torch.arange(num_kv_heads)[:, None]
    selected = cache.view(-1, block_size * head_dim).index_select(0, tiles.flatten())
    return selected.view(len(tables), num_kv_heads, -1, head_dim)


def grouped_queries(case: Case) -> Tensor:
    """[D, K, G, d]."""
    return case.query.view(len(case.lengths), case.keys.shape[1], -1, case.query.shape[-1])


def padded_sdpa(case: Case) -> Tensor:
    """Every sequence gathered at the longest one's length, then one scaled_dot_product_attention."""
    visible = torch.arange(case.tables.shape[1] * BLOCK_SIZE) < case.lengths[:, None]
    output = functional.scaled_dot_product_attention(
        grouped_queries(case),
        gather(case.keys, case.tables),
        gather(case.values, case.tables),
        attn_mask=visible[:, None, None],
        scale=case.scale,
    )
    return output.view_as(case.query)


def padded_bmm(case: Case) -> Tensor:
    """The same with two matrix products and a softmax; half precision rounds the scores."""
    visible = torch.arange(case.tables.shape[1] * BLOCK_SIZE) < case.lengths[:, None]
    scores = (grouped_queries(case) @ gather(case.keys, case.tables).mT).float() * case.scale
    probabilities = scores.masked_fill_(~visible[:, None, None], -torch.inf).softmax(-1)
    return (probabilities.to(case.values.dtype) @ gather(case.values, case.tables)).view_as(case.query)


def one_by_one(case: Case) -> Tensor:
    """Each sequence alone, at its own length and without a mask."""
    queries, outputs = grouped_queries(case), []
    for index, length in enumerate(case.lengths.tolist()):
        table = case.tables[index : index + 1, : -(-length // BLOCK_SIZE)]
        keys, values = gather(case.keys, table)[:, :, :length], gather(case.values, table)[:, :, :length]
        query = queries[index : index + 1]
        outputs.append(functional.scaled_dot_product_attention(query, keys, values, scale=case.scale))
    return torch.cat(outputs).view_as(case.query)


def tile_by_tile(case: Case) -> Tensor:
    """Whole blocks gathered in their own order, a small product per (block, head)."""
    width = case.tables.shape[1]
    visible = torch.arange(width * BLOCK_SIZE) < case.lengths[:, None]
    scores = (grouped_queries(case)[:, None] @ case.keys[case.tables].mT).float() * case.scale  # D B K G S
    by_block = scores.permute(0, 2, 3, 1, 4).contiguous()
    by_head = by_block.flatten(3).masked_fill_(~visible[:, None, None], -torch.inf)
    probabilities = by_head.softmax(-1).to(case.values.dtype).view_as(by_block).permute(0, 3, 1, 2, 4)
    return (probabilities @ case.values[case.tables]).sum(1).view_as(case.query)


def grouped(group_bytes: int) -> Callable[[Case], Tensor]:
    """The reference kernel with another amount of keys gathered at once."""

    def run(case: Case) -> Tensor:
        kept = reference._CPU_GROUP_BYTES
        reference._CPU_GROUP_BYTES = group_bytes
        try:
            return reference.decode_attention(
                case.query, case.keys, case.values, case.tables, case.lengths, case.max_length, case.scale, None
            )
        finally:
            reference._CPU_GROUP_BYTES = kept

    return run


def tiled(query_tile: int) -> Callable[[Case], Tensor]:
    """The reference prefill kernel with another number of queries attended at once."""

    def run(case: Case) -> Tensor:
        kept = reference._QUERY_TILE
        reference._QUERY_TILE = query_tile
        try:
            return reference.prefill_attention(
                case.query,
                case.keys,
                case.values,
                case.tables,
                (case.chunk,) * len(case.lengths),
                tuple(case.lengths.tolist()),
                case.scale,
                None,
            )
        finally:
            reference._QUERY_TILE = kept

    return run


DECODE_CANDIDATES: dict[str, Callable[[Case], Tensor]] = {
    "one by one": one_by_one,
    "padded sdpa": padded_sdpa,
    "padded bmm": padded_bmm,
    "tile by tile": tile_by_tile,
    "group 256K": grouped(2**18),
    "group 1M": grouped(2**20),
    "group 4M": grouped(2**22),
}
PREFILL_CANDIDATES: dict[str, Callable[[Case], Tensor]] = {
    "whole chunk": tiled(2**30),
    "tile 32": tiled(32),
    "tile 64": tiled(64),
    "tile 128": tiled(128),
    "tile 256": tiled(256),
}


def decode_cases(quick: bool) -> dict[str, Tensor]:
    """Context lengths by name."""
    generator = torch.Generator().manual_seed(0)
    cases = {"32 x 128": torch.full((32,), 128), "32 x 512": torch.full((32,), 512)}
    cases["32 ragged 16..1024"] = torch.randint(16, 1025, (32,), generator=generator)
    if not quick:
        cases["256 x 128"] = torch.full((256,), 128)
        cases["256 x 512"] = torch.full((256,), 512)
        cases["256 ragged 16..1024"] = torch.randint(16, 1025, (256,), generator=generator)
    return cases


PREFILL_CASES = {"1 x 512": (1, 512, 512), "8 x 64": (8, 64, 64), "128 after 1920": (1, 128, 2048)}


def read(case: Case) -> None:
    """Read every byte of the context's keys and values."""
    for cache in (case.keys, case.values):
        cache.view(torch.int64).sum()


def measure(case: Case, candidates: dict[str, Callable[[Case], Tensor]], rounds: int, cpu_time: bool) -> list[float]:
    """Median milliseconds of the bound and of each candidate, all checked against the first."""
    expected = next(iter(candidates.values()))(case).float()
    for name, candidate in candidates.items():
        error = float((candidate(case).float() - expected).abs().max())
        if error > (1e-5 if case.query.dtype == torch.float32 else 3e-2):
            raise AssertionError(f"{name} is off by {error}")
    clock = time.thread_time if cpu_time else time.perf_counter
    runs: list[Callable[[Case], object]] = [read, *candidates.values()]
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for index, run in enumerate(runs):
            started = clock()
            run(case)
            samples[index].append(clock() - started)
    return [statistics.median(times) * 1e3 for times in samples]


def print_row(name: str, values: list[float], width: int) -> None:
    """One row of a Markdown table."""
    print(f"| {name:<{width}} | " + " | ".join(f"{value:>8.2f}" for value in values) + " |", flush=True)


def print_head(first: str, names: list[str], width: int) -> None:
    """The head of a Markdown table."""
    print(f"\n| {first:<{width}} | " + " | ".join(f"{name:>8}" for name in names) + " |")
    print("|---" * (len(names) + 1) + "|")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--quick", action="store_true", help="only 32 decodes")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as a worker does
    torch.manual_seed(0)
    shapes = [
        Shape(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=getattr(torch, dtype))
        for dtype in options.dtypes
        for heads, kv_heads, head_dim in ((8, 4, 64), (8, 8, 64), (32, 8, 128))
    ]
    width = 44
    print(f"torch {torch.__version__}, {options.threads} threads, {'CPU' if options.cpu_time else 'wall'} time, ms")
    print_head("decode", ["read", *DECODE_CANDIDATES], width)
    with torch.inference_mode():
        for shape in shapes:
            for name, lengths in decode_cases(options.quick).items():
                case = make_case(shape, lengths)
                values = measure(case, DECODE_CANDIDATES, options.rounds, options.cpu_time)
                print_row(f"{name}, {shape}", values, width)
        print_head("prefill", ["read", *PREFILL_CANDIDATES], width)
        for shape in shapes:
            for name, (count, chunk, length) in PREFILL_CASES.items():
                case = make_case(shape, torch.full((count,), length), chunk)
                values = measure(case, PREFILL_CANDIDATES, options.rounds, options.cpu_time)
                print_row(f"{name}, {shape}", values, width)


if __name__ == "__main__":
    main()
