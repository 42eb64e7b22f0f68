"""Additions are computed with the norms of their sums, each once, and nothing else changes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.kernels import fused
from engine.layers.norm import RMSNorm
from engine.model_config import Architecture
from engine.pipeline.fused_run import FusedRun
from engine.pipeline.pipeline import Pipeline
from tests.engine.gpu_case import config_of, random_model
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
