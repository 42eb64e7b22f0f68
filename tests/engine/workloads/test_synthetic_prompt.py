"""Synthetic prompts: exact lengths, ids in range, shared exactly where blocks are shared, the same every time."""

import pytest

from engine import ConfigError, PlannedRequest, SyntheticPrompts, Workload

BLOCK = 8


def workload(*requests: tuple[int, tuple[int, ...]]) -> Workload:
    return Workload(
        requests=tuple(
            PlannedRequest(num_prompt_tokens=length, num_output_tokens=1, block_ids=blocks)
            for length, blocks in requests
        ),
        description="test",
        block_tokens=BLOCK,
    )


def test_prompts_have_the_planned_length_and_stay_in_the_vocabulary() -> None:
    prompts = SyntheticPrompts(vocab_size=50, first_id=10)
    plan = workload((1, ()), (100, ()), (5, (1,)), (16, (1, 2)), (20, (1, 2)), (9, (1, 2, 3, 4)))
    for index, request in enumerate(plan.requests):
        token_ids = prompts.token_ids(plan, index)
        assert len(token_ids) == request.num_prompt_tokens
        assert all(10 <= token < 50 for token in token_ids)
        assert all(type(token) is int for token in token_ids)


def test_equal_block_ids_are_equal_tokens_and_nothing_else_is() -> None:
    prompts = SyntheticPrompts(vocab_size=100_000)
    plan = workload((20, (1, 2)), (24, (1, 2, 3)), (20, (1, 9)), (20, ()), (20, ()))
    first, second, third, fourth, fifth = (prompts.token_ids(plan, index) for index in range(5))
    assert first[:16] == second[:16]
    assert first[16:] != second[16:20]
    assert first[:8] == third[:8]
    assert not set(first[8:16]) & set(third[8:16])
    assert fourth != fifth


def test_a_prompt_depends_on_the_seed_alone() -> None:
    plan = workload((20, (1,)))
    assert SyntheticPrompts(vocab_size=999).token_ids(plan, 0) == SyntheticPrompts(vocab_size=999).token_ids(plan, 0)
    other = SyntheticPrompts(vocab_size=999, seed=1).token_ids(plan, 0)
    assert other != SyntheticPrompts(vocab_size=999).token_ids(plan, 0)


def test_an_empty_range_of_ids_is_refused() -> None:
    with pytest.raises(ConfigError, match="no token ids"):
        SyntheticPrompts(vocab_size=5, first_id=5)
