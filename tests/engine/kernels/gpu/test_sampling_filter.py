"""Thresholds against the sampler's own way: all tokens in order, their weights summed up."""

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.sampling_filter import thresholds
from engine.sampler import top_token_ids

MASKS = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def kept_by_sampler(
    logits_KV: Tensor, temperatures_K: Tensor, top_k_K: Tensor, top_p_K: Tensor, min_p_K: Tensor
) -> Tensor:
    """What `engine.sampler` keeps of filtered rows, [K, V]: its candidates, all of the vocabulary."""
    logits_KV = logits_KV.float()
    vocab_size = logits_KV.shape[1]
    ids_KV = top_token_ids(logits_KV, vocab_size)
    scores_KV = logits_KV.gather(1, ids_KV) / temperatures_K.float()[:, None]
    top_k_K1 = top_k_K[:, None]
    in_top_k_KV = (torch.arange(vocab_size, device=ids_KV.device) < top_k_K1) | (top_k_K1 == 0)
    relative_KV = (scores_KV - scores_KV[:, :1]).double().exp() * in_top_k_KV
    cumulative_KV = relative_KV.cumsum(-1)
    mass_K1 = top_p_K[:, None] * relative_KV.sum(-1, keepdim=True)
    is_first_KV = (cumulative_KV - relative_KV < mass_K1) | (top_p_K[:, None] == 1)
    kept_KV = in_top_k_KV & is_first_KV & (relative_KV >= min_p_K[:, None])
    return torch.zeros_like(kept_KV).scatter_(1, ids_KV, kept_KV)


def kept_by_threshold(
    logits_KV: Tensor, temperatures_K: Tensor, top_k_K: Tensor, top_p_K: Tensor, min_p_K: Tensor
) -> Tensor:
    """What is left by the kernel's thresholds, [K, V]."""
    given = thresholds(logits_KV, temperatures_K, top_k_K, top_p_K, min_p_K)
    bits_KV = (logits_KV.float() + 0.0).view(torch.int32)
    keys_KV = bits_KV ^ ((bits_KV >> 31) & 0x7FFFFFFF)
    ids_V = torch.arange(logits_KV.shape[1], device=logits_KV.device)
    is_at_KV = (keys_KV == given.keys[:, None]) & (ids_V <= given.last_ids[:, None])
    return (keys_KV > given.keys[:, None]) | is_at_KV


def assert_same_tokens(
    logits_KV: Tensor, temperature: list[float], top_k: list[int], top_p: list[float], min_p: list[float]
) -> None:
    """Row by row."""
    device = logits_KV.device
    filters = (
        torch.tensor(temperature, dtype=torch.float64, device=device),
        torch.tensor(top_k, device=device),
        torch.tensor(top_p, dtype=torch.float64, device=device),
        torch.tensor(min_p, dtype=torch.float64, device=device),
    )
    expected_KV = kept_by_sampler(logits_KV, *filters)
    given_KV = kept_by_threshold(logits_KV, *filters)
    # Without a weight a token cannot be drawn: whether it is kept does not matter.
    counts = (given_KV & logits_KV.isfinite()).sum(-1), expected_KV.sum(-1)
    assert torch.equal(given_KV & logits_KV.isfinite(), expected_KV & logits_KV.isfinite()), counts


@pytest.mark.parametrize(
    ("kind", "vocab_size"),
    [
        ("float32", 37),
        ("bfloat16", 37),
        ("halves", 37),
        ("halves", 2500),
        pytest.param("float32", 2500, marks=pytest.mark.slow),
        pytest.param("bfloat16", 2500, marks=pytest.mark.slow),
    ],
)
def test_filters_keep_what_the_sampler_keeps(device: torch.device, kind: str, vocab_size: int) -> None:
    logits_KV = torch.randn(10, vocab_size, device=device) * 3
    if kind == "bfloat16":
        logits_KV = logits_KV.bfloat16()
    elif kind == "halves":  # nearly all of them equal to others
        logits_KV = (logits_KV * 2).round() / 2
    half = vocab_size // 2
    assert_same_tokens(
        logits_KV,
        [1.0, 0.7, 1.0, 2.0, 1.0, 0.1, 1.3, 5.0, 1.0, 1.0],
        [1, 0, 5, 0, half, 10, 0, 20, 0, vocab_size - 1],
        [1.0, 0.9, 1.0, 0.3, 0.8, 0.5, 0.9999, 0.95, 1e-6, 0.99],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.02, 0.1, 0.5, 0.0],
    )


@pytest.mark.parametrize("kind", ["count", "mass"])
def test_thresholds_that_fall_on_the_borders_of_a_bracket(device: torch.device, kind: str) -> None:
    """Eight steps, so that a quarter ends at a logit; every count and mass up to all of them, exactly met."""
    logits_V = torch.tensor([0.0, 1, 2, 2, 3, 4, 4, 4, 5, 6, 7, 8, 8, 6, 2, 0])
    if kind == "mass":
        logits_V[:] = 8.0
        logits_V[::2] = -2000.0  # no mass at all
    size = len(logits_V)
    counts = list(range(1, size)) if kind == "count" else [0] * (size - 1)
    shares = [1.0] * (size - 1) if kind == "count" else [number / 16 for number in range(1, size)]
    logits_KV = logits_V.repeat(size - 1, 1).to(device)
    assert_same_tokens(logits_KV, [1.0] * (size - 1), counts, shares, [0.0] * (size - 1))


@MASKS
def test_ties_are_kept_by_ascending_id(device: torch.device) -> None:
    logits_KV = torch.zeros(6, 3000, device=device)
    logits_KV[1, 1500:] = -0.0  # equal to the others
    logits_KV[2, ::2] = 1.0
    logits_KV[3, :100] = float("-inf")
    logits_KV[4, 2999] = 4.0
    logits_KV[5] = 1e30
    assert_same_tokens(
        logits_KV,
        [1.0, 1.0, 1.0, 0.5, 1.0, 1.0],
        [2100, 2, 1600, 0, 100, 0],
        [1.0, 1.0, 0.5, 0.25, 1.0, 0.1],
        [0.0] * 6,
    )


@MASKS
def test_odd_rows_end_and_keep_their_best_token(device: torch.device) -> None:
    nothing, huge = float("-inf"), 3e38
    logits_KV = torch.full((7, 50), nothing, device=device)
    logits_KV[0, 7] = 1.0
    logits_KV[1] = torch.linspace(-huge, huge, 50, dtype=torch.float64).float()
    logits_KV[2] = torch.linspace(-1e-38, 1e-38, 50)
    logits_KV[3, 3] = float("inf")
    logits_KV[4] = float("nan")
    logits_KV[5] = torch.cat((torch.full((25,), 1e-40), torch.full((25,), -20.0)))
    logits_KV[5, 0] = 5.0
    filters = torch.ones(7, device=device), torch.full((7,), 3, device=device), torch.full((7,), 0.9, device=device)
    kept_KV = kept_by_threshold(logits_KV, *filters, torch.full((7,), 0.01, device=device))
    assert kept_KV[0].nonzero().flatten().tolist() == [7]
    assert kept_KV[1].nonzero().flatten().tolist() == [49]
    assert kept_KV[2].nonzero().flatten().tolist() == [47, 48, 49]
    assert kept_KV[5].nonzero().flatten().tolist() == [0]


def test_rows_without_filters_keep_everything(device: torch.device) -> None:
    logits_KV = torch.randn(3, 40, device=device)
    temperatures = torch.tensor([1.0, 0.0, 1e-6], device=device)
    off = torch.zeros(3, device=device, dtype=torch.int64), torch.ones(3, device=device), torch.zeros(3, device=device)
    assert bool(kept_by_threshold(logits_KV, temperatures, *off).all())
    on = torch.tensor([0, 2, 2], device=device), torch.tensor([1, 0.1, 0.1], device=device), off[2]
    assert bool(kept_by_threshold(logits_KV, temperatures, *on).all())  # greedy rows have nothing to filter
    assert bool((thresholds(logits_KV, temperatures).keys == -(2**31)).all())


@pytest.mark.slow
def test_filters_keep_what_the_sampler_keeps_of_random_rows(device: torch.device) -> None:
    for _ in range(4):
        size = int(torch.randint(1, 3500, ()))
        rows = 12
        logits_KV = torch.randn(rows, size, device=device) * torch.rand(rows, 1, device=device) * 8
        if torch.rand(()) < 0.5:
            logits_KV = logits_KV.bfloat16().float()
        assert_same_tokens(
            logits_KV,
            (0.2 + 2 * torch.rand(rows)).tolist(),
            (torch.randint(0, size + 1, (rows,)) * torch.randint(0, 2, (rows,)) % size).tolist(),
            torch.rand(rows, dtype=torch.float64).sqrt().tolist(),
            (torch.rand(rows, dtype=torch.float64) * 0.1 * torch.randint(0, 2, (rows,))).tolist(),
        )


def test_wrong_arguments_are_named(device: torch.device) -> None:
    logits_KV = torch.zeros(2, 8, device=device)
    with pytest.raises(ConfigError, match=r"top_p_K is torch.int64"):
        thresholds(logits_KV, torch.ones(2, device=device), None, torch.ones(2, dtype=torch.int64, device=device))
    with pytest.raises(ConfigError, match=r"logits_KV are torch.float64"):
        thresholds(logits_KV.double(), torch.ones(2, device=device))
    with pytest.raises(ConfigError, match=r"logits_KV have shape \(8, 2\) and strides \(1, 8\)"):
        thresholds(logits_KV.T, torch.ones(8, device=device))
