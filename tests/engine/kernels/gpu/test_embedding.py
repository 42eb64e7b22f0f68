"""Embeddings of the tokens of one rank, and zeros for whatever is not a token of it."""

import pytest
import torch

from engine.kernels.gpu.embedding import embedding


@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ranks_together_look_up_every_token_once(
    device: torch.device, dtype: torch.dtype, token_dtype: torch.dtype
) -> None:
    weight_VE = torch.randn(30, 24).to(dtype).to(device)
    tokens_T = torch.tensor([0, 29, 7, 14, 15, 7, -1, 30, 2**31 - 1], dtype=token_dtype, device=device)
    parts = [embedding(tokens_T, weight_VE[first : first + 15], first) for first in (0, 15)]
    assert torch.equal(parts[0] + parts[1], torch.cat((weight_VE[tokens_T[:6].long()], weight_VE.new_zeros(3, 24))))
    assert not (parts[0].bool() & parts[1].bool()).any()


def test_the_grid_does_not_matter_and_no_tokens_are_no_work(device: torch.device) -> None:
    weight_VE = torch.randn(30, 600, device=device)
    tokens_T = torch.randint(0, 30, (7,), device=device)
    output_TE = torch.empty(7, 600, device=device)
    assert embedding(tokens_T, weight_VE, 0, output_TE, num_ctas=2) is output_TE
    assert torch.equal(output_TE, weight_VE[tokens_T])
    assert embedding(tokens_T[:0], weight_VE).shape == (0, 600)
