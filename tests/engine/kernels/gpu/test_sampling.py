"""Tokens drawn by kernels against `engine.sampler`, row by row the same."""

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.gumbel import gumbel_noise, hash_bits
from engine.kernels.gpu.sampling import best_tokens, draw_tokens, splits_of
from engine.request import SamplingParams
from engine.sampler import best_token_ids, sample
from engine.sampling_table import SamplingTable
from engine.staging import stage
from engine.token_pool import TokenPool

CPU = torch.device("cpu")
MASKS = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def drawn_by_sampler(logits_KV: Tensor, params: list[SamplingParams], positions: list[int]) -> Tensor:
    """As the engine draws them on a CPU."""
    num_rows, vocab_size = logits_KV.shape
    table = SamplingTable(num_rows, vocab_size)
    for row, sampling in enumerate(params):
        table.admit(row, sampling, 1)
    pool = TokenPool(max_sequences=num_rows, max_model_len=1, max_blocks_per_sequence=1, device=CPU)
    plan = table.plan(np.arange(num_rows), np.array(positions, dtype=np.int64), with_logprobs=False)
    return sample(logits_KV.cpu().clone(), plan, stage(plan.arrays, CPU), pool).token_ids


def drawn_by_kernel(
    logits_KV: Tensor, params: list[SamplingParams], positions: list[int], num_splits: int | None = None
) -> Tensor:
    """With the same parameters, one of every kind a row."""
    device = logits_KV.device
    seeds = np.array([sampling.seed & (2**64 - 1) for sampling in params], dtype=np.uint64).view(np.int64)
    return draw_tokens(
        logits_KV,
        torch.from_numpy(seeds).to(device),
        torch.tensor(positions, device=device),
        torch.tensor([sampling.temperature for sampling in params], dtype=torch.float64, device=device),
        top_k_K=torch.tensor([sampling.top_k for sampling in params], device=device),
        top_p_K=torch.tensor([sampling.top_p for sampling in params], dtype=torch.float64, device=device),
        min_p_K=torch.tensor([sampling.min_p for sampling in params], dtype=torch.float64, device=device),
        num_splits=num_splits,
    ).cpu()


@pytest.mark.parametrize("num_splits", [None, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 100, 4097, 9000])
def test_the_best_token_is_the_first_of_the_largest(
    device: torch.device, vocab_size: int, dtype: torch.dtype, num_splits: int | None
) -> None:
    logits_KV = torch.randn(3, vocab_size, device=device).to(dtype)
    logits_KV[1] = 0.0
    logits_KV[1, vocab_size // 2 :] = -0.0
    given_K = best_tokens(logits_KV, num_splits=num_splits)
    assert torch.equal(given_K.cpu(), best_token_ids(logits_KV.cpu()))
    assert given_K[1] == 0


@pytest.mark.parametrize("num_splits", [0, -1])
def test_a_number_of_splits_that_is_none_is_refused(device: torch.device, num_splits: int) -> None:
    logits_KV = torch.randn(2, 100, device=device)
    with pytest.raises(ConfigError, match=f"num_splits must be 1 or more, but is {num_splits}; leave it out"):
        best_tokens(logits_KV, num_splits=num_splits)


@MASKS
def test_rows_that_lie_apart_and_rows_without_numbers(device: torch.device) -> None:
    padded_KV = torch.randn(4, 5000, device=device)
    padded_KV[:, 4900:] = 50.0
    padded_KV[2, :4900] = float("-inf")
    padded_KV[3, :4900] = float("nan")
    output_K = torch.empty(4, dtype=torch.int32, device=device)
    assert best_tokens(padded_KV[:, :4900], output_K) is output_K
    assert torch.equal(output_K[:2].cpu().long(), padded_KV[:2, :4900].argmax(-1).cpu())
    assert output_K[2:].tolist() == [0, 0]
    ones = torch.ones(4, device=device)
    tokens_K = draw_tokens(padded_KV[:, :4900], ones.long(), ones.long(), ones)
    assert bool((tokens_K < 4900).all())
    assert best_tokens(padded_KV[:0]).shape == (0,)


@pytest.mark.parametrize(("dtype", "num_splits"), [(torch.float32, 1), (torch.float32, None), (torch.bfloat16, 2)])
def test_mixed_rows_draw_the_sampler_s_tokens(device: torch.device, dtype: torch.dtype, num_splits: int | None) -> None:
    logits_KV = (torch.randn(12, 5000, device=device) * 2).to(dtype)
    seeds = torch.randint(-(2**62), 2**62, (12,)).tolist()
    kinds: list[dict[str, float]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 4.0},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 40},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 100, "top_p": 0.5, "min_p": 0.02},
        {"temperature": 2.0, "top_p": 0.999},
        {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
        {"temperature": 1e-4},
        {"temperature": 1.0, "top_k": 1},
    ]
    params = [SamplingParams(seed=seed, **kind) for seed, kind in zip(seeds, kinds, strict=True)]  # type: ignore[arg-type]
    positions = torch.randint(0, 10000, (12,)).tolist()
    expected_K = drawn_by_sampler(logits_KV, params, positions)
    assert torch.equal(drawn_by_kernel(logits_KV, params, positions, num_splits), expected_K)


def test_without_filters_none_is_looked_for(device: torch.device) -> None:
    logits_KV = torch.randn(30, 700, device=device)
    params = [SamplingParams(seed=row, temperature=row % 3 / 2) for row in range(30)]
    expected_K = drawn_by_sampler(logits_KV, params, list(range(30)))
    temperatures_K = torch.tensor([sampling.temperature for sampling in params], device=device)
    numbers_K = torch.arange(30, device=device)
    given_K = draw_tokens(logits_KV, numbers_K, numbers_K.int(), temperatures_K)
    assert torch.equal(given_K.cpu(), expected_K)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e4])
def test_flat_and_steep_logits_draw_the_sampler_s_tokens(device: torch.device, scale: float) -> None:
    """Where every tile counts, and where approximate scores say little."""
    logits_KV = torch.randn(6, 9000, device=device) * scale
    params = [SamplingParams(seed=row, temperature=1.0 + row) for row in range(6)]
    expected_K = drawn_by_sampler(logits_KV, params, [5] * 6)
    assert torch.equal(drawn_by_kernel(logits_KV, params, [5] * 6), expected_K)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_equal_scores_draw_the_lowest_id_whatever_is_approximate(device: torch.device, num_splits: int) -> None:
    """Logits that cancel their noise: only exact scores tell tokens apart. With top_k the best of equal logits wins."""
    seed, positions = 11, torch.arange(3)
    ids_V = torch.cat((torch.arange(30), torch.arange(4096, 4120))).int()
    numbers_KV = (hash_bits(torch.full((3,), seed), positions, ids_V).float() + 0.5) * 2.0**-31
    noise_KV = -(-(1 - numbers_KV.clamp(max=1 - 2.0**-24).double()).log().float()).double().log().float()
    logits_KV = torch.full((3, 4120), -100.0)
    logits_KV[:, ids_V.long()] = -noise_KV
    logits_KV[1, 20] += 1e-5
    logits_KV[2, 4110] += 1e-5
    params = [SamplingParams(seed=seed, temperature=1.0)] * 3
    given_K = drawn_by_kernel(logits_KV.to(device), params, positions.tolist(), num_splits)
    assert given_K.tolist() == [0, 20, 4110]
    ranked = [SamplingParams(seed=seed, temperature=1.0, top_k=4119)] * 3
    best = int(ids_V[logits_KV[0, ids_V.long()].argmax()])
    given_K = drawn_by_kernel(logits_KV.to(device), ranked, positions.tolist(), num_splits)
    assert given_K.tolist() == [best, 20, 4110]


def test_of_equal_logits_the_first_are_drawn(device: torch.device) -> None:
    params = [SamplingParams(seed=row, temperature=1.0, top_k=2) for row in range(16)]
    logits_KV = torch.ones(16, 40, device=device)
    given_K = drawn_by_kernel(logits_KV, params, [3] * 16)
    assert torch.equal(given_K, drawn_by_sampler(logits_KV, params, [3] * 16))
    assert set(given_K.tolist()) <= {0, 1}


@MASKS
def test_a_tile_that_only_large_noise_can_save_is_not_left_out(device: torch.device) -> None:
    """A token far behind, in the second tile, whose noise of more than 12 makes up for what its logit lacks."""
    ids_V = torch.arange(8192)
    positions_K = torch.arange(400)
    noise_KV = gumbel_noise(torch.zeros(400, dtype=torch.int64), positions_K, ids_V)
    largest_K, tokens_K = noise_KV[:, 4096:].max(1)
    position = int(largest_K.argmax())
    token = 4096 + int(tokens_K[position])
    assert noise_KV[position, token] > 12
    logits_KV = torch.full((1, 8192), float("-inf"), device=device)
    logits_KV[0, token] = 0.0
    logits_KV[0, 5] = noise_KV[position, token] - noise_KV[position, 5] - 0.1
    drawn = drawn_by_kernel(logits_KV, [SamplingParams(seed=0, temperature=1.0)], [position], num_splits=1)
    assert drawn.tolist() == [token]


@pytest.mark.slow
def test_many_draws_are_the_sampler_s(device: torch.device) -> None:
    logits_KV = (torch.randn(1, 1500, device=device) * 3).repeat(150, 1)
    params = [SamplingParams(seed=7, temperature=0.9, top_p=(0.9, 1.0)[row % 2]) for row in range(150)]
    positions = list(range(150))
    assert torch.equal(drawn_by_kernel(logits_KV, params, positions), drawn_by_sampler(logits_KV, params, positions))


def test_splits_fill_the_device_and_none_is_empty() -> None:
    assert splits_of(1, 128256) == 32
    assert splits_of(64, 128256) == 16
    assert splits_of(1024, 128256) == 2
    assert splits_of(2048, 128256) == 1
    for num_rows in (1, 7, 100, 1000, 3000):
        for vocab_size in (1, 4096, 4097, 32000, 151936):
            num_splits, num_tiles = splits_of(num_rows, vocab_size), -(-vocab_size // 4096)
            assert 1 <= num_splits <= num_tiles
            assert (num_splits - 1) * -(-num_tiles // num_splits) < num_tiles
