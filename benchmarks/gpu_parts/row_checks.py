"""Checks of the kernels that memory bounds: norms, activation, quantising, rotation, embedding, sums of ranks.

Launches without a limit and with few programs both.
"""

from collections.abc import Iterator
from functools import partial

import torch
from gpu_parts.check import DTYPES, Check, Prepared
from gpu_parts.check_sizes import CheckSizes
from torch import Tensor
from torch.nn import functional

from engine.kernels.gpu.activation import silu_mul, silu_mul_fp8
from engine.kernels.gpu.all_reduce_add import add_partials
from engine.kernels.gpu.embedding import embedding
from engine.kernels.gpu.norm import add_rms_norm, add_rms_norm_fp8, rms_norm, rms_norm_fp8
from engine.kernels.gpu.quantise import dequantise_rows, quantise_rows
from engine.kernels.gpu.rotary import rotate_and_write

EPSILON = 1e-5
_FEW_CTAS = 7
_E4M3 = torch.float8_e4m3fn


def row_checks(sizes: CheckSizes) -> Iterator[Check]:
    """Every kernel at every number of rows."""
    for num_rows in sizes.rows:
        for num_ctas in (None, _FEW_CTAS):
            for precision in ("bf16", "fp32"):
                limit = "" if num_ctas is None else f" {num_ctas} CTAs"
                norms = f"{num_rows}x{sizes.hidden}{limit}"
                gates = f"{num_rows}x{sizes.intermediate}{limit}"
                shape = num_rows, sizes.hidden, num_ctas
                gated = num_rows, sizes.intermediate, num_ctas
                yield _check("rms_norm", norms, precision, partial(_norm, precision, *shape, False))
                yield _check("add_rms_norm", norms, precision, partial(_norm, precision, *shape, True))
                yield _check("silu_mul", gates, precision, partial(_silu, precision, *gated))
                yield _check("embedding", norms, precision, partial(_embedding, precision, *shape))
                for num_ranks in (2, 8):
                    name = f"{norms} {num_ranks} ranks"
                    yield _check("add_partials", name, precision, partial(_sum, precision, *shape, num_ranks))
            yield _check("rms_norm_fp8", norms, "e4m3", partial(_norm_fp8, *shape, False))
            yield _check("add_rms_norm_fp8", norms, "e4m3", partial(_norm_fp8, *shape, True))
            yield _check("silu_mul_fp8", gates, "e4m3", partial(_silu_fp8, *gated))
            yield _check("quantise_rows", norms, "e4m3", partial(_quantised, *shape))
    for head_dim in sizes.head_dims:
        for group in sizes.group_sizes:
            for is_normalised in (False, True):
                for cached in ("bf16", "fp8"):
                    kind = "q/k norm" if is_normalised else "plain"
                    yield _check(
                        "rotate_and_write",
                        f"{max(sizes.rows)} tokens G{group} d{head_dim} {kind}, {cached} cache",
                        "e4m3" if cached == "fp8" else "bf16",
                        partial(_rotary, max(sizes.rows), group, head_dim, is_normalised, cached),
                    )


def _check(kernel: str, shape: str, precision: str, prepare: partial[Prepared]) -> Check:
    return Check(kernel=kernel, shape=shape, precision=precision, prepare=prepare)


def _random(precision: str, *shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(DTYPES[precision])


def _normed(hidden_TE: Tensor, weight_E: Tensor) -> Tensor:
    wide_TE = hidden_TE.double()
    return wide_TE * torch.rsqrt(wide_TE.square().mean(-1, keepdim=True) + EPSILON) * weight_E.double()


def _norm(
    precision: str, num_rows: int, width: int, num_ctas: int | None, adds: bool, device: torch.device
) -> Prepared:
    hidden, residual = (_random(precision, num_rows, width, device=device) for _ in range(2))
    weight = _random(precision, width, device=device)
    output, new_residual = torch.empty_like(hidden), torch.empty_like(hidden)

    def launch() -> dict[str, Tensor]:
        if not adds:
            return {"output": rms_norm(hidden, weight, EPSILON, output, num_ctas=num_ctas)}
        add_rms_norm(hidden, residual, weight, EPSILON, output, new_residual_TE=new_residual, num_ctas=num_ctas)
        return {"output": output, "residual": new_residual}

    def expect() -> dict[str, Tensor]:
        if not adds:
            return {"output": _normed(hidden, weight)}
        total = hidden.double() + residual.double()
        return {"output": _normed(total.to(hidden.dtype), weight), "residual": total}

    return Prepared(launch=launch, expect=expect, buffers=(output, new_residual) if adds else (output,))


def _norm_fp8(num_rows: int, width: int, num_ctas: int | None, adds: bool, device: torch.device) -> Prepared:
    hidden, residual = (_random("bf16", num_rows, width, device=device) for _ in range(2))
    weight = _random("bf16", width, device=device)
    values, scales = _quantised_buffers(num_rows, width, device)
    new_residual = torch.empty_like(hidden)

    def launch() -> dict[str, Tensor]:
        if adds:
            add_rms_norm_fp8(
                hidden, residual, weight, EPSILON, values, scales, new_residual_TE=new_residual, num_ctas=num_ctas
            )
        else:
            rms_norm_fp8(hidden, weight, EPSILON, values, scales, num_ctas=num_ctas)
        return {"output": dequantise_rows(values, scales)}

    def expect() -> dict[str, Tensor]:
        total = (hidden.double() + residual.double()).to(hidden.dtype) if adds else hidden
        return {"output": _normed(total, weight)}

    return Prepared(launch=launch, expect=expect, buffers=(values, scales))


def _silu(precision: str, num_rows: int, width: int, num_ctas: int | None, device: torch.device) -> Prepared:
    given = _random(precision, num_rows, 2 * width, device=device)
    output = torch.empty(num_rows, width, dtype=given.dtype, device=device)
    return Prepared(
        launch=lambda: {"output": silu_mul(given, output, num_ctas=num_ctas)},
        expect=lambda: {"output": _gated(given)},
        buffers=(output,),
    )


def _silu_fp8(num_rows: int, width: int, num_ctas: int | None, device: torch.device) -> Prepared:
    given = _random("bf16", num_rows, 2 * width, device=device)
    values, scales = _quantised_buffers(num_rows, width, device)

    def launch() -> dict[str, Tensor]:
        silu_mul_fp8(given, values, scales, num_ctas=num_ctas)
        return {"output": dequantise_rows(values, scales)}

    return Prepared(launch=launch, expect=lambda: {"output": _gated(given)}, buffers=(values, scales))


def _gated(given: Tensor) -> Tensor:
    gate, up = given.double().chunk(2, -1)
    return functional.silu(gate) * up


def _quantised(num_rows: int, width: int, num_ctas: int | None, device: torch.device) -> Prepared:
    given = _random("bf16", num_rows, width, device=device)
    values, scales = _quantised_buffers(num_rows, width, device)

    def launch() -> dict[str, Tensor]:
        quantise_rows(given, values, scales, num_ctas=num_ctas)
        return {"output": dequantise_rows(values, scales)}

    return Prepared(launch=launch, expect=lambda: {"output": given.double()}, buffers=(values, scales))


def _quantised_buffers(num_rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.empty(num_rows, width, dtype=_E4M3, device=device), torch.empty(num_rows, device=device)


def _embedding(precision: str, num_tokens: int, width: int, num_ctas: int | None, device: torch.device) -> Prepared:
    """Ids before, within and behind the rows of this rank."""
    first_row, num_rows = 100, 900
    tokens = torch.randint(0, 1100, (num_tokens,), device=device)
    weight = _random(precision, num_rows, width, device=device)
    output = torch.empty(num_tokens, width, dtype=weight.dtype, device=device)

    def expect() -> dict[str, Tensor]:
        is_here = (tokens >= first_row) & (tokens < first_row + num_rows)
        rows = weight[(tokens - first_row).clamp(0, num_rows - 1)].double()
        return {"output": rows * is_here[:, None]}

    return Prepared(
        launch=lambda: {"output": embedding(tokens, weight, first_row, output, num_ctas=num_ctas)},
        expect=expect,
        buffers=(output,),
    )


def _sum(
    precision: str, num_rows: int, width: int, num_ctas: int | None, num_ranks: int, device: torch.device
) -> Prepared:
    partials = [_random(precision, num_rows, width, device=device) for _ in range(num_ranks)]
    residual = _random(precision, num_rows, width, device=device)
    output = torch.empty_like(residual)
    return Prepared(
        launch=lambda: {"output": add_partials(partials, output, residual_TE=residual, num_ctas=num_ctas)},
        expect=lambda: {"output": sum((one.double() for one in partials), residual.double())},
        buffers=(output,),
    )


def _rotary(
    num_tokens: int, group: int, head_dim: int, is_normalised: bool, cached: str, device: torch.device
) -> Prepared:
    """Every third token is padding and writes nothing; slots are shuffled over the borders of blocks."""
    num_kv_heads, block_size, num_positions = 2, 16, 500
    num_heads = num_kv_heads * group
    qkv = _random("bf16", num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device)
    positions = torch.randint(0, num_positions, (num_tokens,), device=device)
    angles = torch.outer(torch.arange(num_positions, device=device).float(), torch.rand(head_dim // 2, device=device))
    table = torch.cat((angles.cos(), angles.sin()), -1)
    num_blocks = -(-2 * num_tokens // block_size)
    slots = torch.randperm(num_blocks * block_size, device=device)[:num_tokens]
    slots[::3] = -1
    weights = [_random("bf16", head_dim, device=device) for _ in range(2)] if is_normalised else [None, None]
    shape = num_blocks, num_kv_heads, block_size, head_dim
    keys, values = (torch.empty(shape, dtype=DTYPES[cached], device=device) for _ in range(2))
    query = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=device)
    scales = (0.05, 0.04) if cached == "fp8" else (1.0, 1.0)
    is_kept = slots >= 0
    kept = slots[is_kept]  # not in `launch`, where the host may not wait for how many there are

    def written(cache: Tensor) -> Tensor:
        return cache.float()[kept // block_size, :, kept % block_size]

    def launch() -> dict[str, Tensor]:
        rotate_and_write(
            qkv, positions, slots, keys, values, table, num_heads=num_heads, q_weight=weights[0], k_weight=weights[1],
            epsilon=EPSILON, key_scale=scales[0], value_scale=scales[1], query_THd=query,
        )  # fmt: skip
        return {"query": query, "keys": written(keys), "values": written(values)}

    def expect() -> dict[str, Tensor]:
        heads = qkv.double().view(num_tokens, -1, head_dim)
        wide_query, wide_key, wide_value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], 1)
        if weights[0] is not None and weights[1] is not None:
            wide_query, wide_key = _normed(wide_query, weights[0]), _normed(wide_key, weights[1])
        cos, sin = table[positions][:, None].double().chunk(2, -1)
        return {
            "query": _rotated(wide_query, cos, sin),
            "keys": _rotated(wide_key, cos, sin)[is_kept] / scales[0],
            "values": wide_value[is_kept] / scales[1],
        }

    return Prepared(launch=launch, expect=expect, buffers=(query, keys, values))


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
