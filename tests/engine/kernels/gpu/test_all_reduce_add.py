"""Sums of partial results in float32, in the order of the ranks, rounded once."""

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels.gpu.all_reduce_add import add_partials


@pytest.mark.parametrize("num_ctas", [None, 2])
@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_partials_are_added_in_order(device: torch.device, num_ranks: int, num_ctas: int | None) -> None:
    partials = [torch.randn(5, 1700).to(torch.bfloat16).to(device) for _ in range(num_ranks)]
    total_TE = partials[0].float()
    for partial_TE in partials[1:]:
        total_TE += partial_TE.float()
    assert torch.equal(add_partials(partials, num_ctas=num_ctas), total_TE.bfloat16())


@pytest.mark.parametrize("width", [1, 64, 1700])
def test_partials_may_lie_side_by_side(device: torch.device, width: int) -> None:
    """As slices of one row for all ranks; not as slices of rows of different widths."""
    rows = torch.randn(5, 3 * width).to(torch.bfloat16).to(device)
    expected_TE = add_partials([part.contiguous() for part in rows.chunk(3, dim=1)])
    found_TE = add_partials(rows.chunk(3, dim=1), num_ctas=2)
    assert found_TE.is_contiguous() and torch.equal(found_TE, expected_TE)
    with pytest.raises(ConfigError, match=r"partials\[1\] has strides"):
        add_partials([rows[:, :width], torch.cat((rows, rows), dim=1)[:, :width]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_residual_is_added_to_the_rounded_sum_also_in_place(device: torch.device, dtype: torch.dtype) -> None:
    first_TE, second_TE, residual_TE = (torch.randn(3, 50).to(dtype).to(device) for _ in range(3))
    expected_TE = residual_TE + (first_TE + second_TE)
    given_TE = add_partials([first_TE, second_TE], residual_TE, residual_TE=residual_TE)
    assert given_TE is residual_TE
    assert torch.equal(given_TE, expected_TE)


def test_wrong_numbers_and_shapes_of_partials_are_refused(device: torch.device) -> None:
    partial_TE = torch.zeros(2, 4, device=device)
    assert add_partials([partial_TE[:0]]).shape == (0, 4)
    with pytest.raises(ConfigError, match=r"9 partial results"):
        add_partials([partial_TE] * 9)
    with pytest.raises(ConfigError, match=r"partials\[1\] has shape \(1, 4\), where \(2, 4\) is right"):
        add_partials([partial_TE, partial_TE[:1]])
