from itertools import pairwise

from hypothesis import assume, given
from hypothesis import strategies as st

from engine.pipeline.nano_batch import Cut, NanoBatch
from tests.engine.pipeline.schedule_strategies import cuts


def _kinds(cut: Cut) -> str:
    """The batch position by position: d for a decode, p for a prefill token."""
    return "".join("d" * part.num_decodes + "p" * part.num_prefills for part in cut.nano_batches)


def test_borders_of_two_nano_batches() -> None:
    cut = Cut((NanoBatch(480, 288), NanoBatch(800, 480)))
    assert cut.borders == (0, 768, 2048)
    assert (cut.num_decodes, cut.num_prefills, cut.num_tokens) == (1280, 768, 2048)
    assert cut.scaled(128, 77).nano_batches == (NanoBatch(48, 29), NanoBatch(80, 48))


@given(cuts())
def test_tokens_before_a_position_are_those_counted_one_by_one(cut: Cut) -> None:
    kinds = _kinds(cut)
    assert cut.borders[-1] == cut.num_tokens == len(kinds)
    for position in range(len(kinds) + 1):
        assert cut.decodes_before(position) == kinds[:position].count("d")
        assert cut.prefills_before(position) == kinds[:position].count("p")


@given(cuts(), st.integers(0, 60), st.integers(0, 60))
def test_scaling_keeps_proportions_within_a_token(cut: Cut, num_decodes: int, num_prefills: int) -> None:
    assume((cut.num_decodes or not num_decodes) and (cut.num_prefills or not num_prefills))
    scaled = cut.scaled(num_decodes, num_prefills)
    assert (scaled.num_decodes, scaled.num_prefills) == (num_decodes, num_prefills)
    for before, after in zip(cut.nano_batches, scaled.nano_batches, strict=True):
        if cut.num_decodes:
            assert abs(after.num_decodes - before.num_decodes * num_decodes / cut.num_decodes) <= 1
        if cut.num_prefills:
            assert abs(after.num_prefills - before.num_prefills * num_prefills / cut.num_prefills) <= 1


@given(cuts(), st.integers(0, 60), st.integers(0, 60))
def test_positions_move_with_the_scale_and_keep_their_order(cut: Cut, num_decodes: int, num_prefills: int) -> None:
    assume((cut.num_decodes or not num_decodes) and (cut.num_prefills or not num_prefills))
    scaled = cut.scaled(num_decodes, num_prefills)
    moved = [cut.position_in(scaled, position) for position in range(cut.num_tokens + 1)]
    assert moved == sorted(moved)
    assert moved[-1] == scaled.num_tokens
    # Tokens of one kind stay tokens of that kind, so no range gains a kind that it did not have.
    kinds = _kinds(scaled)
    for kind, (start, stop) in zip(_kinds(cut), pairwise(moved), strict=True):
        assert set(kinds[start:stop]) <= {kind}


@given(cuts())
def test_a_cut_scaled_to_its_own_size_is_itself(cut: Cut) -> None:
    assert cut.scaled(cut.num_decodes, cut.num_prefills) == cut
    assert [cut.position_in(cut, position) for position in range(cut.num_tokens + 1)] == list(range(cut.num_tokens + 1))
