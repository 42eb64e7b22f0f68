"""Checks of matrix products: every candidate on a ragged shape, the chosen one on a model's, and those of experts."""

import math
from collections.abc import Iterator
from functools import partial

import torch
from gpu_parts.check import DTYPES, Check, Prepared
from gpu_parts.check_sizes import CheckSizes
from torch import Tensor
from torch.nn import functional

from engine.kernels.gpu import gemm_config, grouped_gemm_config
from engine.kernels.gpu.expert_routing import ExpertRouting, route
from engine.kernels.gpu.gemm import gemm
from engine.kernels.gpu.gemm_config import GemmConfig
from engine.kernels.gpu.grouped_gemm import gated_gemm, scattered_gemm
from engine.kernels.gpu.mixture_of_experts import mixture_of_experts
from engine.kernels.gpu.quantise import quantise_rows_reference
from engine.kernels.gpu.scaled_gemm import scaled_gemm


def product_checks(sizes: CheckSizes) -> Iterator[Check]:
    """In the order of what matters most."""
    candidates = (*gemm_config.CANDIDATES, gemm_config.CORESIDENT)
    ragged = sizes.ragged_product
    for config in candidates if sizes.has_all_candidates else candidates[-1:]:
        for precision in ("bf16", "fp8"):
            yield _product(precision, ragged, sizes.num_sms[0], config)
    for shape in sizes.products:
        for num_sms in sizes.num_sms:
            yield _product("bf16", shape, num_sms, None)
        yield _product("fp8", shape, sizes.num_sms[-1], None)
    yield _product("fp8", sizes.products[0], None, None)  # the library's
    yield _product("fp8", sizes.products[-1], None, None)
    yield _product("fp32", ragged, sizes.num_sms[0], None)


def expert_checks(sizes: CheckSizes) -> Iterator[Check]:
    """Routing, both grouped products with every candidate, and all of it together."""
    gated, plain = grouped_gemm_config.GATED_CANDIDATES, grouped_gemm_config.PLAIN_CANDIDATES
    for config in gated if sizes.has_all_candidates else gated[-1:]:
        yield _grouped(sizes, sizes.experts[-1], "gated", config)
    for config in plain if sizes.has_all_candidates else plain[-1:]:
        yield _grouped(sizes, sizes.experts[-1], "scattered", config)
    for shape in sizes.experts:
        yield _routing(shape)
        yield _experts(sizes, shape, "bf16")
    yield _experts(sizes, min(sizes.experts, key=lambda shape: abs(shape[0] - 300)), "fp32")


def _described(config: GemmConfig | None, num_sms: int | None) -> str:
    if config is None:
        return "library" if num_sms is None else f"chosen, {num_sms} SMs"
    limit = "" if config.max_registers is None else f", {config.max_registers} registers"
    return f"{config.rows}x{config.columns}, {config.num_stages} stages{limit}"


def _product(precision: str, shape: tuple[int, int, int], num_sms: int | None, config: GemmConfig | None) -> Check:
    name = "scaled_gemm" if precision == "fp8" else "gemm"
    return Check(
        kernel=name,
        shape=f"{'x'.join(map(str, shape))} {_described(config, num_sms)}",
        precision=precision,
        prepare=partial(_prepare_scaled if precision == "fp8" else _prepare_product, precision, shape, num_sms, config),
    )


def _prepare_product(
    precision: str, shape: tuple[int, int, int], num_sms: int | None, config: GemmConfig | None, device: torch.device
) -> Prepared:
    num_tokens, num_outputs, num_inner = shape
    dtype = DTYPES[precision]
    a_TK = torch.randn(num_tokens, num_inner, device=device).to(dtype)
    b_NK = (torch.randn(num_outputs, num_inner, device=device) / num_inner**0.5).to(dtype)
    residual_TN = torch.randn(num_tokens, num_outputs, device=device).to(dtype)
    bias_N = torch.randn(num_outputs, device=device).to(dtype)
    output = torch.empty_like(residual_TN)
    assert num_sms is not None, "the library's own product in bfloat16 is not ours to check"

    def launch() -> dict[str, Tensor]:
        gemm(a_TK, b_NK, num_sms=num_sms, residual_TN=residual_TN, bias_N=bias_N, output=output, config=config)
        return {"output": output}

    return Prepared(
        launch=launch,
        expect=lambda: {"output": a_TK.double() @ b_NK.double().T + residual_TN.double() + bias_N.double()},
        buffers=(output,),
    )


def _prepare_scaled(
    precision: str, shape: tuple[int, int, int], num_sms: int | None, config: GemmConfig | None, device: torch.device
) -> Prepared:
    num_tokens, num_outputs, num_inner = shape
    a_TK, a_scales_T = quantise_rows_reference(torch.randn(num_tokens, num_inner, device=device))
    b_NK, b_scales_N = quantise_rows_reference(torch.randn(num_outputs, num_inner, device=device) / num_inner**0.5)
    residual_TN = torch.randn(num_tokens, num_outputs, device=device).bfloat16()
    output = torch.empty_like(residual_TN)

    def launch() -> dict[str, Tensor]:
        scaled_gemm(
            a_TK, a_scales_T, b_NK, b_scales_N, residual_TN=residual_TN, output=output, num_sms=num_sms, config=config
        )
        return {"output": output}

    def expect() -> dict[str, Tensor]:
        a, b = a_TK.double() * a_scales_T[:, None], b_NK.double() * b_scales_N[:, None]
        return {"output": a @ b.T + residual_TN.double()}

    return Prepared(launch=launch, expect=expect, buffers=(output,))


def _logits(num_tokens: int, num_experts: int, device: torch.device) -> Tensor:
    """Distinct for each token; the first expert gets no token, the last every one."""
    logits_TX = torch.rand(num_tokens, num_experts, device=device).argsort(-1).float() / num_experts
    logits_TX[:, 0], logits_TX[:, -1] = -9.0, 9.0
    return logits_TX


def _routing(shape: tuple[int, int, int]) -> Check:
    def prepare(device: torch.device) -> Prepared:
        num_tokens, num_experts, num_choices = shape
        logits_TX = _logits(num_tokens, num_experts, device)

        def launch() -> dict[str, Tensor]:
            routing = route(logits_TX, num_choices, normalise=True, round_scores=False)
            return {name: getattr(routing, name) for name in ("experts", "order", "starts", "scores")}

        def expect() -> dict[str, Tensor]:
            scores, experts = torch.softmax(logits_TX.double(), -1).topk(num_choices, -1)
            flat = experts.flatten()
            counts = torch.bincount(flat, minlength=num_experts)
            return {
                "experts": experts,
                "order": flat.argsort(stable=True),
                "starts": torch.cat((counts.new_zeros(1), counts.cumsum(0))),
                "scores": scores / scores.sum(-1, keepdim=True),
            }

        return Prepared(launch=launch, expect=expect)

    return Check(kernel="route", shape="x".join(map(str, shape)), precision="fp32", prepare=prepare)


def _weights(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    weights = torch.randn(shape, device=device) / math.sqrt(shape[-1])
    return weights.to(dtype)


def _grouped(sizes: CheckSizes, shape: tuple[int, int, int], form: str, config: GemmConfig) -> Check:
    """One grouped product; what is expected goes expert by expert."""

    def prepare(device: torch.device) -> Prepared:
        num_tokens, num_experts, num_choices = shape
        hidden, width = sizes.hidden // 4, sizes.intermediate // 16 // 8 * 8 or sizes.intermediate
        dtype = torch.bfloat16
        routing = route(_logits(num_tokens, num_experts, device), num_choices, normalise=True, round_scores=False)
        num_copies = num_tokens * num_choices
        is_gated = form == "gated"
        if is_gated:
            given = torch.randn(num_tokens, hidden, device=device).to(dtype)
            weight = _weights((num_experts, 2 * width, hidden), dtype, device)
            output = torch.empty(num_copies, width, dtype=dtype, device=device)
        else:
            given = torch.randn(num_copies, width, device=device).to(dtype)
            weight = _weights((num_experts, hidden, width), dtype, device)
            output = torch.empty(num_copies, hidden, dtype=dtype, device=device)
        compute = gated_gemm if is_gated else scattered_gemm

        def launch() -> dict[str, Tensor]:
            return {"output": compute(given, weight, routing, num_sms=sizes.num_sms[0], output=output, config=config)}

        def expect() -> dict[str, Tensor]:
            expected = torch.zeros(output.shape, dtype=torch.float64, device=device)
            for expert, copies, places in _by_expert(routing):
                if is_gated:
                    gate, up = (given[copies // num_choices].double() @ weight[expert].double().T).chunk(2, -1)
                    expected[places] = functional.silu(gate) * up
                else:
                    expected[copies] = given[places].double() @ weight[expert].double().T
            return {"output": expected}

        return Prepared(launch=launch, expect=expect, buffers=(output,))

    return Check(
        kernel=f"{form}_gemm",
        shape=f"{'x'.join(map(str, shape))} {_described(config, None)}",
        precision="bf16",
        prepare=prepare,
    )


def _by_expert(routing: ExpertRouting) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that has copies, its copies and their places."""
    starts = routing.starts.tolist()
    for expert in range(routing.num_experts):
        start, stop = starts[expert], starts[expert + 1]
        if start < stop:
            yield expert, routing.order[start:stop].long(), torch.arange(start, stop, device=routing.order.device)


def _experts(sizes: CheckSizes, shape: tuple[int, int, int], precision: str) -> Check:
    """Routing, both products and the sum; the last quarter of the tokens is padding and becomes zeros."""

    def prepare(device: torch.device) -> Prepared:
        num_tokens, num_experts, num_choices = shape
        hidden, width = sizes.hidden // 4, sizes.intermediate // 16 // 8 * 8 or sizes.intermediate
        dtype = DTYPES[precision]
        hidden_TE = torch.randn(num_tokens, hidden, device=device).to(dtype)
        logits_TX = _logits(num_tokens, num_experts, device)
        gate_up = _weights((num_experts, 2 * width, hidden), dtype, device)
        down = _weights((num_experts, hidden, width), dtype, device)
        num_real = num_tokens - num_tokens // 4
        rows_T = torch.arange(num_tokens, device=device)
        positions_T = torch.where(rows_T < num_real, rows_T, -1)
        output = torch.empty_like(hidden_TE)

        def launch() -> dict[str, Tensor]:
            mixture_of_experts(
                hidden_TE, logits_TX, gate_up, down, num_choices, normalise=True, round_scores=False,
                num_sms=sizes.num_sms[0], positions_T=positions_T, output=output,
            )  # fmt: skip
            return {"output": output}

        def expect() -> dict[str, Tensor]:
            scores, experts = torch.softmax(logits_TX.double(), -1).topk(num_choices, -1)
            scores /= scores.sum(-1, keepdim=True)
            expected = torch.zeros(output.shape, dtype=torch.float64, device=device)
            for expert in range(num_experts):
                tokens, choices = (experts[:num_real] == expert).nonzero(as_tuple=True)
                if len(tokens):
                    gate, up = (hidden_TE[tokens].double() @ gate_up[expert].double().T).chunk(2, -1)
                    result = (functional.silu(gate) * up) @ down[expert].double().T
                    expected.index_add_(0, tokens, result * scores[tokens, choices][:, None])
            return {"output": expected}

        return Prepared(launch=launch, expect=expect, buffers=(output,))

    return Check(kernel="mixture_of_experts", shape="x".join(map(str, shape)), precision=precision, prepare=prepare)
