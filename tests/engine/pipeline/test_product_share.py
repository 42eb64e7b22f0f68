"""Shares of time: which one counts for how many tokens, and examples that lie within what they look up."""

import torch

from engine.kernels.kernel import Argument
from engine.pipeline.product_share import ProductShare, _example


def test_the_share_of_the_largest_number_not_above_counts() -> None:
    share = ProductShare((0.1, 0.2, 0.3, 0.4))
    assert [share.at(tokens) for tokens in (1, 7, 8, 63, 64, 511, 512, 5000)] == [
        *(0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4)
    ]


def test_positions_stay_within_a_small_table() -> None:
    positions = _example(Argument("int64", ("T",)), num_tokens=64, num_rows=16)
    assert len(positions) == 64 and int(positions.max()) < 16
    assert _example(Argument("bfloat16", ("T", 8)), num_tokens=3, num_rows=16).shape == torch.Size([3, 8])
