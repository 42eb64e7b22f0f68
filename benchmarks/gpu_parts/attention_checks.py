"""Checks of attention: every candidate that fits, every group size, head dimension and dtype, windows, empty lanes."""

from collections.abc import Iterator
from functools import partial
from itertools import accumulate

import torch
from gpu_parts.check import DTYPES, Check, Prepared
from gpu_parts.check_sizes import CheckSizes
from gpu_parts.random_cache import RandomCache
from torch import Tensor

from engine.kernels import reference
from engine.kernels.gpu import decode_config as decode_configs
from engine.kernels.gpu import prefill_config as prefill_configs
from engine.kernels.gpu.decode_attention import decode_attention
from engine.kernels.gpu.decode_config import DecodeConfig, decode_config, padded_rows
from engine.kernels.gpu.decode_plan import DecodeScratch
from engine.kernels.gpu.prefill_attention import prefill_attention
from engine.kernels.gpu.prefill_config import PrefillConfig

LARGEST_SHARED_BYTES = 227 * 1024
_KEY_SCALE, _VALUE_SCALE = 0.7, 1.3  # of an fp8 cache
_NUM_KV_HEADS = 2


def decode_checks(sizes: CheckSizes) -> Iterator[Check]:
    """A case is (precision, group size, head dimension, block size, CTAs, window, configuration)."""
    group_size, head_dim = sizes.group_sizes[len(sizes.group_sizes) // 2], sizes.head_dims[-1]
    block_size, num_ctas = sizes.block_sizes[-1], sizes.num_ctas[-1]
    make = partial(_decode, sizes)
    for precision in ("bf16", "fp8", "fp32"):
        yield make(precision, group_size, head_dim, block_size, num_ctas, None, None)
    for config in decode_candidates(group_size, head_dim) if sizes.has_all_candidates else ():
        yield make("bf16", group_size, head_dim, block_size, sizes.num_ctas[0], None, config)
        yield make("fp8", group_size, head_dim, block_size, sizes.num_ctas[0], None, config)
    for ctas in sizes.num_ctas:
        yield make("bf16", group_size, head_dim, block_size, ctas, sizes.window, None)
    for group in sizes.group_sizes:
        for width in sizes.head_dims:
            for slots in sizes.block_sizes:
                for precision in ("bf16", "fp8", "fp32"):
                    yield make(precision, group, width, slots, num_ctas, None, None)
    yield make("fp8", group_size, head_dim, block_size, num_ctas, sizes.window, None)


def prefill_checks(sizes: CheckSizes) -> Iterator[Check]:
    """A case is (precision, group size, head dimension, block size, window, configuration)."""
    group_size, head_dim = sizes.group_sizes[len(sizes.group_sizes) // 2], sizes.head_dims[-1]
    block_size = sizes.block_sizes[-1]
    make = partial(_prefill, sizes)
    for precision in ("bf16", "fp8", "fp32"):
        yield make(precision, group_size, head_dim, block_size, None, None)
    for width in sizes.head_dims if sizes.has_all_candidates else ():
        for config in prefill_configs.CANDIDATES[width]:
            yield make("bf16", group_size, width, block_size, None, config)
            yield make("fp8", group_size, width, block_size, None, config)
    yield make("bf16", group_size, head_dim, block_size, sizes.window, None)
    for group in sizes.group_sizes:
        for width in sizes.head_dims:
            for slots in sizes.block_sizes:
                for precision in ("bf16", "fp8", "fp32"):
                    yield make(precision, group, width, slots, None, None)


def decode_candidates(group_size: int, head_dim: int, cache_bytes: int = 2) -> list[DecodeConfig]:
    """Those that fit into shared memory, and the one that lies beside a matrix product."""
    fitting = [
        config
        for config in decode_configs.CANDIDATES
        if config.shared_bytes(
            head_dim=head_dim, rows=padded_rows(group_size), cache_bytes=cache_bytes, query_bytes=2
        )
        <= LARGEST_SHARED_BYTES
    ]  # fmt: skip
    return [*fitting, decode_configs.CORESIDENT]


def scratch_for(cache: RandomCache, group_size: int, num_ctas: int, config: DecodeConfig) -> DecodeScratch:
    """Of exactly this launch."""
    _, _, block_size, head_dim = cache.keys.shape
    return DecodeScratch.allocate(
        max_rows=len(cache.lengths),
        max_blocks=cache.block_tables.shape[1],
        block_size=block_size,
        group_size=group_size,
        head_dim=head_dim,
        max_ctas=num_ctas,
        tile=config.tile,
        device=cache.keys.device,
    )


def described(config: DecodeConfig | PrefillConfig | None) -> str:
    """For the name of a row."""
    if config is None:
        return "chosen"
    rows = f"{config.rows}x" if isinstance(config, PrefillConfig) else ""
    limit = "" if config.max_registers is None else f" {config.max_registers} registers"
    return f"tile {rows}{config.tile} {config.num_warps} warps {config.num_stages} stages{limit}"


def _decode(
    sizes: CheckSizes,
    precision: str,
    group_size: int,
    head_dim: int,
    block_size: int,
    num_ctas: int,
    window: int | None,
    config: DecodeConfig | None,
) -> Check:
    seen = "" if window is None else f" window {window}"
    return Check(
        kernel="decode_attention",
        shape=f"G{group_size} d{head_dim} S{block_size} {num_ctas} CTAs{seen} {described(config)}",
        precision=precision,
        prepare=partial(_prepare_decode, sizes, precision, group_size, head_dim, block_size, num_ctas, window, config),
    )


def _prepare_decode(
    sizes: CheckSizes,
    precision: str,
    group_size: int,
    head_dim: int,
    block_size: int,
    num_ctas: int,
    window: int | None,
    config: DecodeConfig | None,
    device: torch.device,
) -> Prepared:
    cache = _cache(sizes.decode_lengths, precision, head_dim, block_size, device)
    query_DHd = _query(len(cache.lengths), group_size, head_dim, precision, device)
    key_scale, value_scale = _scales(precision)
    launched = config or decode_config(
        head_dim=head_dim,
        group_size=group_size,
        cache_bytes=cache.keys.element_size(),
        query_bytes=query_DHd.element_size(),
        num_ctas=num_ctas,
        num_sms=max(sizes.num_sms),
    )
    scratch = scratch_for(cache, group_size, num_ctas, launched)
    output = torch.empty_like(query_DHd)

    def launch() -> dict[str, Tensor]:
        decode_attention(
            query_DHd, cache.keys, cache.values, cache.block_tables, cache.lengths,
            scale=head_dim**-0.5, num_ctas=num_ctas, scratch=scratch, window=window,
            key_scale=key_scale, value_scale=value_scale, output=output, config=launched,
        )  # fmt: skip
        return {"output": output}

    def expect() -> dict[str, Tensor]:
        kept = [row for row, length in enumerate(sizes.decode_lengths) if length]
        expected = torch.zeros(output.shape, dtype=torch.float64, device=device)
        expected[kept] = reference.decode_attention(
            query_DHd[kept].double(), cache.keys.double() * key_scale, cache.values.double() * value_scale,
            cache.block_tables[kept].long(), cache.lengths[kept].long(), max(sizes.decode_lengths), head_dim**-0.5,
            window,
        )  # fmt: skip
        return {"output": expected}

    return Prepared(launch=launch, expect=expect, buffers=(output,))


def _prefill(
    sizes: CheckSizes,
    precision: str,
    group_size: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    config: PrefillConfig | None,
) -> Check:
    seen = "" if window is None else f" window {window}"
    return Check(
        kernel="prefill_attention",
        shape=f"G{group_size} d{head_dim} S{block_size}{seen} {described(config)}",
        precision=precision,
        prepare=partial(_prepare_prefill, sizes, precision, group_size, head_dim, block_size, window, config),
    )


def _prepare_prefill(
    sizes: CheckSizes,
    precision: str,
    group_size: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    config: PrefillConfig | None,
    device: torch.device,
) -> Prepared:
    lengths, chunks = sizes.prefill_lengths, sizes.prefill_sizes
    cache = _cache(lengths, precision, head_dim, block_size, device)
    num_padding = 9
    query_QHd = _query(sum(chunks) + num_padding, group_size, head_dim, precision, device)
    starts_P1 = torch.tensor([0, *accumulate(chunks)], dtype=torch.int32, device=device)
    key_scale, value_scale = _scales(precision)
    output = torch.empty_like(query_QHd)

    def launch() -> dict[str, Tensor]:
        prefill_attention(
            query_QHd, cache.keys, cache.values, cache.block_tables, starts_P1, cache.lengths,
            scale=head_dim**-0.5, window=window, key_scale=key_scale, value_scale=value_scale, output=output,
            config=config,
        )  # fmt: skip
        return {"output": output}

    def expect() -> dict[str, Tensor]:
        kept = [row for row, size in enumerate(chunks) if size]
        expected = torch.zeros(output.shape, dtype=torch.float64, device=device)
        expected[: sum(chunks)] = reference.prefill_attention(
            query_QHd[: sum(chunks)].double(), cache.keys.double() * key_scale, cache.values.double() * value_scale,
            cache.block_tables[kept].long(), tuple(chunks[row] for row in kept), tuple(lengths[row] for row in kept),
            head_dim**-0.5, window,
        )  # fmt: skip
        return {"output": expected}

    return Prepared(launch=launch, expect=expect, buffers=(output,))


def _cache(
    lengths: tuple[int, ...], precision: str, head_dim: int, block_size: int, device: torch.device
) -> RandomCache:
    return RandomCache.of(
        lengths,
        num_kv_heads=_NUM_KV_HEADS,
        block_size=block_size,
        head_dim=head_dim,
        dtype=DTYPES[precision],
        device=device,
    )


def _query(num_rows: int, group_size: int, head_dim: int, precision: str, device: torch.device) -> Tensor:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return torch.randn(num_rows, _NUM_KV_HEADS * group_size, head_dim, device=device).to(dtype)


def _scales(precision: str) -> tuple[float, float]:
    return (_KEY_SCALE, _VALUE_SCALE) if precision == "fp8" else (1.0, 1.0)
