"""Whole sampling plans drawn by the kernels, against the sampler."""

import numpy as np
import pytest
import torch

from engine.kernels.gpu.planned_draw import draw_planned
from engine.request import SamplingParams
from engine.sampler import sample
from engine.sampling_table import SamplingTable
from engine.staging import stage
from engine.token_pool import TokenPool

GREEDY = SamplingParams(temperature=0.0)
PLANS = {
    "greedy": [GREEDY] * 3,
    "plain": [SamplingParams(seed=1, temperature=0.7), GREEDY, SamplingParams(seed=2**64 - 1, temperature=1.5)],
    "min_p": [GREEDY, SamplingParams(seed=5, temperature=1.0, min_p=0.2), SamplingParams(seed=6, temperature=1.0)],
    "filtered": [SamplingParams(seed=3, temperature=1.0, top_k=7), GREEDY, GREEDY],
    "all": [
        SamplingParams(seed=4, temperature=1.0, top_p=0.8, min_p=0.05),
        SamplingParams(seed=5, temperature=2.0, min_p=0.1),
        GREEDY,
        SamplingParams(seed=6, temperature=0.5, top_k=3),
    ],
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_are_drawn_as_by_the_sampler(device: torch.device, name: str) -> None:
    params = PLANS[name]
    check(params, torch.randn(len(params), 600, device=device) * 2, device)


@pytest.mark.filterwarnings("ignore:overflow encountered in divide:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("name", PLANS)
def test_infinite_logits_are_drawn(device: torch.device, name: str) -> None:
    """As a model in float16 overflows to."""
    params = PLANS[name]
    logits_KV = torch.randn(len(params), 600, device=device) * 2
    logits_KV[:, 7] = logits_KV[0, 300] = torch.inf
    check(params, logits_KV, device)


def check(params: list[SamplingParams], logits_KV: torch.Tensor, device: torch.device) -> None:
    """Both draw the same tokens."""
    num_rows, vocab_size = logits_KV.shape
    table = SamplingTable(num_rows, vocab_size)
    for row, sampling in enumerate(params):
        table.admit(row, sampling, 1)
    cpu = torch.device("cpu")
    pool = TokenPool(max_sequences=num_rows, max_model_len=1, max_blocks_per_sequence=1, device=cpu)
    plan = table.plan(np.arange(num_rows), np.arange(num_rows) + 11, with_logprobs=False)
    expected = sample(logits_KV.cpu().clone(), plan, stage(plan.arrays, cpu), pool).token_ids
    assert torch.equal(draw_planned(logits_KV, plan, stage(plan.arrays, device)).cpu(), expected)
    output_K = torch.empty(num_rows, dtype=torch.int64, device=device)
    assert draw_planned(logits_KV, plan, stage(plan.arrays, device), output_K) is output_K
