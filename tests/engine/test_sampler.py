"""Sampling: exact supports, right frequencies, and draws that depend on nothing but seed, position and logits."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.gumbel import gumbel_noise, hash_bits
from engine.request import SamplingParams
from engine.sampler import Drawn, best_token_ids, sample, top_token_ids
from engine.sampling_table import SamplingPlan, SamplingTable
from engine.staging import stage
from engine.token_pool import TokenPool

CPU = torch.device("cpu")
EOS = 3


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def draw(
    logits: Tensor,
    params: Sequence[SamplingParams],
    *,
    positions: Sequence[int] | None = None,
    histories: Sequence[Sequence[int]] | None = None,
    num_prompt_tokens: int = 1,
) -> tuple[Drawn, SamplingPlan]:
    """Draw one token per row of `logits`; a row's history is its sequence so far, which only penalties look at."""
    num_rows, vocab_size = logits.shape
    histories = histories or [[0]] * num_rows
    positions = positions or [len(history) for history in histories]
    table = SamplingTable(num_rows, vocab_size, frozenset({EOS}))
    width = max(len(history) for history in histories)
    pool = TokenPool(max_sequences=num_rows, max_model_len=width, max_blocks_per_sequence=1, device=CPU)
    for row, (sampling, history) in enumerate(zip(params, histories, strict=True)):
        table.admit(row, sampling, num_prompt_tokens)
        pool.tokens[row] = vocab_size - 1  # a former owner's
        pool.tokens[row, : len(history)] = torch.tensor(history, dtype=torch.int32)
    plan = table.plan(np.arange(num_rows), np.array(positions, dtype=np.int64), with_logprobs=True)
    return sample(logits.clone(), plan, stage(plan.arrays, CPU), pool), plan


def frequencies(logits: Tensor, sampling: SamplingParams, num_draws: int) -> Counter[int]:
    """How often each token is drawn from the row `logits`, over as many positions of one sequence."""
    table = SamplingTable(1, len(logits))
    table.admit(0, sampling, 1)
    pool = TokenPool(max_sequences=1, max_model_len=1, max_blocks_per_sequence=1, device=CPU)
    plan = table.plan(np.zeros(num_draws, np.int64), np.arange(1, num_draws + 1), with_logprobs=False)
    drawn = sample(logits.repeat(num_draws, 1), plan, stage(plan.arrays, CPU), pool)
    return Counter(drawn.token_ids.tolist())


def chi_square_is_plausible(counts: Counter[int], probabilities: Tensor) -> bool:
    """Within five standard deviations of the chi-square distribution of right frequencies."""
    num_draws = counts.total()
    expected = {token: float(p) * num_draws for token, p in enumerate(probabilities) if p > 0}
    assert set(counts) <= set(expected)
    assert min(expected.values()) > 5
    statistic = sum((counts[token] - mean) ** 2 / mean for token, mean in expected.items())
    freedom = len(expected) - 1
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


# --- the hash ---------------------------------------------------------------------------------------------------


def reference_bits(seed: int, position: int, token: int) -> int:
    """The documented hash in Python's integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    key = mix((mix(seed % 2**64) + position * 0x9E3779B97F4A7C15) % 2**64)
    bits = (token * 0x9E3779B9 + key) % 2**32
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) % 2**32
    bits ^= bits >> 15
    bits = ((bits ^ (key >> 32)) * 0x846CA68B) % 2**32
    return (bits ^ (bits >> 16)) & 0x7FFFFFFF


def test_hash_is_the_documented_one() -> None:
    """A continued request may meet another version of this program: the hash is part of the protocol."""
    seeds, positions, tokens = [0, 1, -7, 2**62 + 5], [0, 17, 4096, 131071], [0, 1, 31999, 151935]
    bits = hash_bits(torch.tensor(seeds), torch.tensor(positions), torch.tensor(tokens))
    expected = [[reference_bits(s, p, token) for token in tokens] for s, p in zip(seeds, positions, strict=True)]
    assert bits.tolist() == expected


def test_noise_is_gumbel_and_independent_between_rows() -> None:
    vocabulary = torch.arange(20_000)
    noise = gumbel_noise(torch.tensor([1, 1, 2]), torch.tensor([5, 6, 5]), vocabulary).double()
    assert bool(noise.isfinite().all())
    for row in noise:  # mean: Euler's constant; variance: pi^2 / 6
        assert float(row.mean()) == pytest.approx(0.5772, abs=5 * 1.283 / math.sqrt(20_000))
        assert float(row.var()) == pytest.approx(math.pi**2 / 6, rel=0.08)
        fractions = torch.exp(-torch.exp(-row)).histc(20, 0, 1) / 20_000  # the distribution function is uniform
        assert float((fractions - 0.05).abs().max()) < 5 * math.sqrt(0.05 / 20_000)
    correlations = torch.corrcoef(noise) - torch.eye(3)
    assert float(correlations.abs().max()) < 5 / math.sqrt(20_000)


# --- distributions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_match_the_softmax(temperature: float) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(2))
    counts = frequencies(logits, SamplingParams(temperature=temperature, seed=9), 50_000)
    assert chi_square_is_plausible(counts, (logits / temperature).softmax(0))


def test_frequencies_over_seeds_at_one_position() -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(2))
    params = [SamplingParams(seed=seed) for seed in range(20_000)]
    drawn, _ = draw(logits.expand(len(params), -1), params)
    assert chi_square_is_plausible(Counter(drawn.token_ids.tolist()), logits.softmax(0))


def filtered_probabilities(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """top_k, then top_p of what is left, then min_p, one token at a time."""
    probabilities = (logits.double() / sampling.temperature).softmax(0)
    order = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    order = order[: sampling.top_k or None]
    total = sum(float(probabilities[token]) for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= sampling.top_p * total or float(probabilities[token]) < sampling.min_p * float(
            probabilities[order[0]]
        ):
            break
        kept.append(token)
        mass += float(probabilities[token])
    result = torch.zeros_like(probabilities)
    result[kept] = probabilities[kept]
    return result / result.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(top_k=1, seed=4),
        SamplingParams(top_k=5, seed=4),
        SamplingParams(top_p=0.5, seed=4),
        SamplingParams(top_p=0.9, temperature=1.5, seed=4),
        SamplingParams(min_p=0.2, seed=4),
        SamplingParams(top_k=8, top_p=0.7, seed=4),
        SamplingParams(top_k=20, top_p=0.95, min_p=0.1, temperature=0.8, seed=4),
    ],
)
def test_filters_keep_exactly_their_tokens_and_their_proportions(sampling: SamplingParams) -> None:
    logits = torch.randn(60, generator=torch.Generator().manual_seed(3))
    counts = frequencies(logits, sampling, 30_000)
    expected = filtered_probabilities(logits, sampling)
    assert set(counts) == set(expected.nonzero().flatten().tolist())
    assert len(counts) == 1 or chi_square_is_plausible(counts, expected)


def test_top_p_widens_beyond_the_first_candidates() -> None:
    """A flat distribution needs nearly all of a vocabulary larger than what is tried first; a peaked one one token."""
    flat, peaked = torch.zeros(3000), torch.zeros(3000)
    peaked[1234] = 50.0
    sampling = SamplingParams(top_p=0.9)
    num_draws = 1200
    drawn, _ = draw(
        torch.stack([flat, peaked]).repeat(num_draws, 1),
        [sampling] * (2 * num_draws),
        positions=range(1, 2 * num_draws + 1),
    )
    assert set(drawn.token_ids[1::2].tolist()) == {1234}
    from_flat = Counter(drawn.token_ids[::2].tolist())
    assert max(from_flat) < 2700 <= max(from_flat) + 50  # equal logits rank by id: exactly the first 90 %
    assert len(from_flat) > 800


@pytest.mark.parametrize("vocab_size", [7, 64, 6400, 6401])
@pytest.mark.parametrize("count", [1, 5, 40, 700])
def test_top_token_ids_are_those_of_a_stable_sort(vocab_size: int, count: int) -> None:
    """Few distinct values, so that almost every comparison is a tie."""
    count = min(count, vocab_size)
    scores = torch.randint(-3, 4, (5, vocab_size), generator=torch.Generator().manual_seed(0)).float()
    scores[0] = 1.0
    expected = scores.sort(descending=True, stable=True).indices[:, :count]
    assert torch.equal(top_token_ids(scores, count), expected)
    assert torch.equal(best_token_ids(scores), expected[:, 0])


def test_equal_logits_rank_by_token_id() -> None:
    logits = torch.zeros(2, 100)
    logits[1, 40:60] = 2.0
    assert top_token_ids(logits, 4).tolist() == [[0, 1, 2, 3], [40, 41, 42, 43]]
    assert top_token_ids(torch.tensor([[-0.0, 0.0, -1.0, torch.inf, -torch.inf]]), 5).tolist() == [[3, 0, 1, 2, 4]]
    drawn, _ = draw(logits, [SamplingParams(temperature=0)] * 2)
    assert drawn.token_ids.tolist() == [0, 40]
    assert set(frequencies(logits[1], SamplingParams(top_k=3), 200)) == {40, 41, 42}


# --- independence -----------------------------------------------------------------------------------------------

MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(seed=5),
    SamplingParams(seed=2**64 - 1, temperature=0.7, top_k=7),
    SamplingParams(seed=6, top_p=0.8),
    SamplingParams(seed=7, min_p=0.05),
    SamplingParams(seed=-3, top_k=50, top_p=0.9, min_p=0.01),
    SamplingParams(seed=8, frequency_penalty=0.5, presence_penalty=0.2),
    SamplingParams(temperature=0, repetition_penalty=1.3),
    SamplingParams(seed=9, logit_bias=((11, 5.0), (12, -100.0))),
    SamplingParams(seed=10, min_tokens=8, stop_token_ids=frozenset({1, 2})),
    SamplingParams(seed=11, logprobs=3),
]


def test_draws_do_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows = 4 * len(MIXED)
    logits = 3 * torch.randn(num_rows, 700, generator=generator)
    params = MIXED * 4
    histories = [torch.randint(0, 700, (5 + row % 7,), generator=generator).tolist() for row in range(num_rows)]
    together, _ = draw(logits, params, histories=histories)
    order = torch.randperm(num_rows, generator=generator).tolist()
    shuffled, _ = draw(logits[order], [params[i] for i in order], histories=[histories[i] for i in order])
    assert shuffled.token_ids.tolist() == together.token_ids[order].tolist()
    for row in range(num_rows):
        alone, _ = draw(logits[row : row + 1], [params[row]], histories=[histories[row]])
        assert alone.token_ids.tolist() == together.token_ids[row : row + 1].tolist()


def test_seed_and_position_change_the_draw() -> None:
    logits = torch.zeros(64, 1000)
    by_position, _ = draw(logits, [SamplingParams(seed=1)] * 64, positions=range(1, 65))
    by_seed, _ = draw(logits, [SamplingParams(seed=seed) for seed in range(64)])
    assert len(set(by_position.token_ids.tolist())) > 50
    assert len(set(by_seed.token_ids.tolist())) > 50


# --- parameters that edit logits --------------------------------------------------------------------------------


def test_greedy_rows_need_nothing_staged() -> None:
    _, plan = draw(torch.randn(4, 50), [SamplingParams(temperature=0)] * 4)
    assert plan.arrays == {}


def test_penalties_follow_their_definitions() -> None:
    """One prompt token 5 (twice), output 6, 6, 7; OpenAI's formula, and repetition over prompt and output."""
    logits = torch.linspace(-2, 2, 10).repeat(3, 1)
    histories = [[5, 5, 6, 6, 7]] * 3
    cases = [
        SamplingParams(temperature=0, presence_penalty=0.5, logprobs=0),
        SamplingParams(temperature=0, frequency_penalty=0.25, logprobs=0),
        SamplingParams(temperature=0, repetition_penalty=2.0, logprobs=0),
    ]
    expected = logits.clone()
    expected[0, [6, 7]] -= 0.5
    expected[1, 6] -= 0.5
    expected[1, 7] -= 0.25
    expected[2, [5, 6, 7]] /= 2
    table = SamplingTable(3, 10)
    pool = TokenPool(max_sequences=3, max_model_len=8, max_blocks_per_sequence=1, device=CPU)
    pool.tokens[:] = 9
    for row, sampling in enumerate(cases):
        table.admit(row, sampling, 2)
        pool.tokens[row, :5] = torch.tensor(histories[row], dtype=torch.int32)
    plan = table.plan(np.arange(3), np.full(3, 5), with_logprobs=False)
    edited = logits.clone()
    sample(edited, plan, stage(plan.arrays, CPU), pool)
    torch.testing.assert_close(edited, expected)


def test_repetition_penalty_of_negative_logits_lowers_them() -> None:
    logits = torch.tensor([[-1.0, -1.5, -9.0, -9.0]])
    drawn, _ = draw(logits, [SamplingParams(temperature=0, repetition_penalty=2.0)], histories=[[0]])
    assert drawn.token_ids.tolist() == [1]


def test_logit_bias_is_added() -> None:
    logits = torch.zeros(2, 20)
    params = [SamplingParams(temperature=0, logit_bias=((7, 1.0), (8, 2.0))), SamplingParams(temperature=0)]
    drawn, _ = draw(logits, params)
    assert drawn.token_ids.tolist() == [8, 0]


def test_min_tokens_holds_back_end_and_stop_ids() -> None:
    logits = torch.zeros(3, 20)
    logits[:, EOS], logits[:, 9], logits[:, 15] = 9.0, 8.0, 7.0
    sampling = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=frozenset({9}))
    drawn, _ = draw(logits, [sampling] * 3, positions=[4, 5, 6], num_prompt_tokens=4)
    assert drawn.token_ids.tolist() == [15, 15, EOS]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(1))
    params = [
        SamplingParams(temperature=0.3, logprobs=2, logit_bias=((4, 100.0),)),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, logprobs=4),
    ]
    drawn, plan = draw(logits, params)
    assert drawn.logprobs is not None and drawn.top_logprobs is not None and drawn.top_token_ids is not None
    assert plan.logprobs_indices.tolist() == [0, 2]
    assert int(drawn.token_ids[0]) == 4
    raw = logits.log_softmax(-1)
    torch.testing.assert_close(drawn.logprobs, torch.stack([raw[0, 4], raw[2].max()]))
    expected = raw[[0, 2]].topk(4)
    assert drawn.top_token_ids.tolist() == expected.indices.tolist()
    torch.testing.assert_close(drawn.top_logprobs, expected.values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [6400, 6464, 6401])
def test_best_tokens_of_any_precision_are_the_lowest_of_equal_ones(dtype: torch.dtype, vocab_size: int) -> None:
    """Narrow logits tie often, and many rows are looked at some at a time."""
    scores = torch.randn(400, vocab_size, generator=torch.Generator().manual_seed(5)).to(dtype)
    scores[7] = -torch.inf
    drawn, _ = draw(scores, [SamplingParams(temperature=0)] * len(scores))
    assert torch.equal(drawn.token_ids, scores.float().sort(descending=True, stable=True).indices[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_drawn_from_as_their_float32_values(dtype: torch.dtype) -> None:
    logits = torch.randn(len(MIXED), 64, generator=torch.Generator().manual_seed(6)).to(dtype)
    histories = [[1, 2, 3, 2]] * len(MIXED)
    narrow, _ = draw(logits, MIXED, histories=histories)
    wide, _ = draw(logits.float(), MIXED, histories=histories)
    assert torch.equal(narrow.token_ids, wide.token_ids)


def test_plans_of_the_same_rows_differ_in_what_depends_on_the_position() -> None:
    """Step after step, the plan is the one that a table would make which has never seen these rows before."""

    def table() -> SamplingTable:
        table = SamplingTable(len(MIXED), 50, frozenset({EOS}))
        for row, sampling in enumerate(MIXED):
            table.admit(row, sampling, 2)
        return table

    kept = table()
    some = np.arange(0, len(MIXED), 2)
    for rows, start in (
        (np.arange(len(MIXED)), 3),
        (np.arange(len(MIXED)), 4),
        (some, 5),
        (some, 30),
        (some[::-1], 31),
    ):
        positions = start + rows
        for with_logprobs in (True, False):
            plan, fresh = (each.plan(rows, positions, with_logprobs) for each in (kept, table()))
            assert list(plan.arrays) == list(fresh.arrays)
            assert all(np.array_equal(plan.arrays[name], fresh.arrays[name]) for name in fresh.arrays)
            assert plan.history_width == fresh.history_width
            assert np.array_equal(plan.logprobs_indices, fresh.logprobs_indices)
            for name in ("plain", "filtered", "penalised"):
                expected = positions[plan.arrays[f"{name}_index"].astype(np.int64)]
                assert np.array_equal(plan.arrays[f"{name}_position"], expected)
    kept.admit(0, SamplingParams(temperature=0), 2)
    assert 0 not in kept.plan(some, some, False).arrays["plain_index"]


def test_staged_arrays_keep_their_values_and_types_and_one_of_two_names_travels_once() -> None:
    numbers, fractions = np.array([3, -1]), np.array([0.5, 2.0, -1.0])
    staged = stage({"a": numbers, "b": fractions, "same": numbers, "nothing": np.empty(0, np.int64)}, CPU)
    assert staged["a"].tolist() == staged["same"].tolist() == [3, -1]
    assert staged["a"].data_ptr() == staged["same"].data_ptr()
    assert staged["b"].tolist() == [0.5, 2.0, -1.0]
    assert len(staged["nothing"]) == 0
    assert stage({}, CPU) == {}


def test_a_row_forgets_its_former_parameters() -> None:
    table = SamplingTable(1, 50, frozenset({EOS}))
    rows, positions = np.zeros(1, np.int64), np.array([3])
    table.admit(0, MIXED[8], 2)
    table.admit(0, SamplingParams(temperature=0, min_tokens=9), 2)
    assert set(table.plan(rows, positions, True).arrays) == {"banned_index", "banned_token"}
    table.admit(0, SamplingParams(temperature=0), 2)
    assert table.plan(rows, positions, True).arrays == {}


def test_logits_that_are_not_numbers_still_give_a_token_of_the_vocabulary() -> None:
    """A broken model must not take the engine down with an index out of range."""
    for value in (torch.nan, torch.inf, -torch.inf):
        drawn, _ = draw(torch.full((len(MIXED), 40), value), MIXED[:8] + MIXED[8:])
        assert all(0 <= token < 40 for token in drawn.token_ids.tolist())
