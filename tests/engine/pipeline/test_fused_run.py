"""Additions are computed with the norms of their sums, each once, and nothing else changes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.batch_shape import BatchShape
from engine.gpu_model import use_gpu_kernels
from engine.kernels import fused
from engine.kernels.row_scales import quantise_into
from engine.layers.activation import SiluAndMul
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.model_config import Architecture, DType
from engine.models import build_model
from engine.models.decoder import Decoder
from engine.number_format import NumberFormat
from engine.pipeline.fused_run import FusedRun
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.synthetic_step import synthetic_cache, synthetic_step
from engine.tensor_parallel import TensorParallel
from tests.engine.gpu_case import DEVICE, config_of, random_model
from tests.engine.models.paged_run import BLOCK_SIZE, steps_of


@pytest.mark.parametrize("architecture", [Architecture.LLAMA, Architecture.MIXTRAL])
@pytest.mark.parametrize("can_fuse", [False, True])
def test_layers_compute_what_the_model_does(architecture: Architecture, can_fuse: bool) -> None:
    config = replace(config_of(architecture), block_size=BLOCK_SIZE)
    model = random_model(config, kernels=False)
    num_norms: list[str] = []

    def of_sum(norm: RMSNorm, left_TE: Tensor, right_TE: Tensor) -> tuple[Tensor, Tensor]:
        num_norms.append("together")
        return fused.rms_norm(left_TE + right_TE, norm.weight, epsilon=norm.epsilon), left_TE + right_TE

    for module in model.modules():
        if isinstance(module, RMSNorm):
            if can_fuse:
                module.of_sum = lambda left, right, norm=module: of_sum(norm, left, right)
            module.register_forward_hook(lambda *_: num_norms.append("alone"))
    run = FusedRun(Pipeline(model, config.model.hidden_size).programs)
    assert run.num_fused == (3 if can_fuse else 0)
    tokens = [torch.arange(41) * 7 % 300, torch.arange(26) * 11 % 300]
    with torch.inference_mode():
        for (step, _), (again, _) in zip(steps_of(tokens, config), steps_of(tokens, config), strict=True):
            expected = model.embed_tokens(step)
            for layer in model.layers:
                expected = layer(expected, step)
            num_norms.clear()
            assert torch.equal(run(model.embed_tokens(again), again), expected)
            assert num_norms == (["alone"] + ["together"] * 3 if can_fuse else ["alone"] * 4)


def _fp8_model(architecture: Architecture) -> tuple[Decoder, Any]:
    """Products in FP8 and the rest in bfloat16, computed by kernels."""
    config = config_of(architecture, dtype=DType.BFLOAT16)
    config = replace(config, product_format=NumberFormat.FP8, kv_cache_format=NumberFormat.BFLOAT16)
    model = build_model(config.model, TensorParallel(), torch.bfloat16, DEVICE, in_fp8=True)
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        weight = torch.empty(parameter.shape).normal_(0.0, 0.3, generator=generator)
        if parameter.dtype is torch.float8_e4m3fn:
            quantise_into(parameter.data, parameters[name + "_scale"].data, weight)
        elif not name.endswith("_scale"):
            parameter.data.copy_(weight)
    assert use_gpu_kernels(model, config, DEVICE, print)
    return model, config


@pytest.mark.parametrize(
    ("architecture", "num_quantised"), [(Architecture.LLAMA, 6), (Architecture.MIXTRAL, 2)], ids=["dense", "experts"]
)
def test_what_only_fp8_products_read_is_made_in_fp8(architecture: Architecture, num_quantised: int) -> None:
    """Two norms and a gate of each layer; a router, which is not in FP8, wants the norm before it as it is."""
    pytest.importorskip("triton")
    model, config = _fp8_model(architecture)
    pipeline = Pipeline(model, config.model.hidden_size)
    run = FusedRun(pipeline.programs)
    assert (run.num_fused, run.num_quantised) == (3, num_quantised)
    launches: list[str] = []

    def noted(name: str, compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*inputs: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
            launches.append(name)
            return compute(*inputs, **options)

        return run

    for module in model.modules():
        if isinstance(module, Linear | RMSNorm | SiluAndMul):
            module.computed_by(noted("quantise" if isinstance(module, Linear) else "plain", module.forward))
    shape = BatchShape(num_decodes=3, num_prefills=5, decode_context=20, prefill_context=4)

    def outcome(run: FusedRun) -> torch.Tensor:
        cache = synthetic_cache(config, 200, DEVICE)
        for tensor in (*cache.keys, *cache.values):
            tensor.copy_(torch.linspace(-1, 1, tensor.numel()).view(tensor.shape))
        step = synthetic_step(shape, config.max_model_len, cache, DEVICE)
        step = replace(step, tokens=torch.arange(len(step.tokens), device=DEVICE) * 7)
        with torch.inference_mode():
            return run(model.embed_tokens(step), step)

    found_TE = outcome(run)
    # A product for what attention left, in both layers, and the routers.
    assert launches.count("plain") == 0 and launches.count("quantise") == (2 if num_quantised == 6 else 4)
    for module in model.modules():
        if isinstance(module, RMSNorm | SiluAndMul):
            module.quantised = None
    separate = FusedRun(pipeline.programs)
    assert (separate.num_fused, separate.num_quantised) == (3, 0)
    assert torch.equal(outcome(separate), found_TE) and found_TE.isfinite().all()
    assert "plain" in launches
