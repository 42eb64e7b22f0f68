"""The noise inside kernels against `engine.gumbel`: the same bits, and logarithms as near as float32 has them."""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.gumbel import gumbel_noise, hash_bits
from engine.kernels.gpu.gumbel_noise import (
    LARGEST_NOISE,
    NOISE_ERROR,
    approximate_noise,
    exact_noise,
    row_keys,
    uniform,
)

SIZE = 4096


@triton.jit
def _noise(seeds: tl.tensor, positions: tl.tensor, first_ids: tl.tensor, output: tl.tensor, SIZE: tl.constexpr) -> None:
    row = tl.program_id(0)
    low, high = row_keys(tl.load(seeds + row), tl.load(positions + row))
    ids = tl.load(first_ids + row) + tl.arange(0, SIZE)
    numbers = uniform(low, high, ids)
    places = output + row * 3 * SIZE + tl.arange(0, SIZE)
    tl.store(places, numbers)
    tl.store(places + SIZE, exact_noise(numbers))
    tl.store(places + 2 * SIZE, approximate_noise(numbers))


@triton.jit
def _noise_of(numbers: tl.tensor, output: tl.tensor, SIZE: tl.constexpr) -> None:
    places = tl.arange(0, SIZE)
    given = tl.load(numbers + places)
    tl.store(output + places, exact_noise(given))
    tl.store(output + SIZE + places, approximate_noise(given))


def steps_apart(first: Tensor, second: Tensor) -> Tensor:
    """How many float32 lie between, of values of one sign."""
    return (first.view(torch.int32) - second.view(torch.int32)).abs()


def test_hash_and_noise_are_the_sampler_s(device: torch.device) -> None:
    seeds = torch.cat((torch.tensor([0, -1, 2**63 - 1, -(2**63)]), torch.randint(-(2**62), 2**62, (4,)))).to(device)
    positions = torch.randint(0, 2**20, (8,), device=device)
    first_ids = torch.tensor([0, 1, 4096, 124160, 0, 151936, 7, 2**20], device=device, dtype=torch.int32)
    output = torch.empty(8, 3, SIZE, device=device)
    _noise[(8,)](seeds, positions, first_ids, output, SIZE)
    ids = first_ids[:, None] + torch.arange(SIZE, dtype=torch.int32, device=device)
    numbers = (hash_bits(seeds, positions, ids).float() + 0.5).mul(2.0**-31).clamp(max=1 - 2.0**-24)
    assert torch.equal(output[:, 0], numbers)
    expected = gumbel_noise(seeds, positions, ids)
    torch.testing.assert_close(output[:, 1], expected, rtol=4e-7, atol=4e-7)
    assert bool((output[:, 1] == expected).float().mean() > 0.6)
    assert bool((output[:, 2] - output[:, 1]).abs().max() < NOISE_ERROR / 10)


def test_noise_is_finite_and_bounded_to_the_ends_of_the_interval(device: torch.device) -> None:
    exponents = torch.arange(SIZE, device=device) * (32 / SIZE)
    small = torch.exp2(-exponents).mul(2**32).round().clamp(min=1).mul(2.0**-32)
    numbers = torch.cat((small[: SIZE // 2], 1 - small[SIZE // 2 :])).clamp(2.0**-32, 1 - 2.0**-24)
    for given in (numbers, small.clamp(max=1 - 2.0**-24)):
        output = torch.empty(2, SIZE, device=device)
        _noise_of[(1,)](given, output, SIZE)
        exact = -(-torch.log1p(-given.double())).float().double().log()
        torch.testing.assert_close(output[0].double(), exact, rtol=1e-7, atol=1e-12)
        assert bool(output.isfinite().all())
        assert bool(output[0].max() < LARGEST_NOISE)
        assert bool((output[1] - output[0]).abs().max() < NOISE_ERROR / 10)
