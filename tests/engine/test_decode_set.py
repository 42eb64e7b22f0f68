"""The set of decodes against one that looks at every sequence in every step."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.decode_set import DecodeSet
from engine.request import Request, RequestId, SamplingParams
from engine.sequence import Sequence

BLOCK_SIZE = 4
NUM_ROWS = 200


def seated(row: int, prompt: int, max_tokens: int) -> Sequence:
    """A sequence in a row."""
    sampling = SamplingParams(max_tokens=max_tokens)
    sequence = Sequence(
        Request(request_id=RequestId(str(row)), prompt_token_ids=(1,) * prompt, sampling=sampling), 0, 0
    )
    sequence.row = row
    return sequence


@dataclass
class Seen:
    """What the slow set knows of a row."""

    sequence: Sequence
    position: int


change = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 12), st.integers(2, 15)),
    st.tuples(st.just("remove"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("late"), st.integers(0, 30), st.just(0)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(change, max_size=3), max_size=40))
def test_steps_are_those_of_a_set_that_looks_at_everybody(script: list[list[tuple[str, int, int]]]) -> None:
    decodes = DecodeSet(NUM_ROWS, BLOCK_SIZE)
    seen: dict[int, Seen] = {}
    rows = iter(range(NUM_ROWS))
    before: list[Sequence] | None = None
    for changes in script:
        for kind, number, max_tokens in changes:
            if kind == "add":
                sequence = seated(next(rows), number, max_tokens)
                decodes.add(sequence, number)
                seen[sequence.row] = Seen(sequence, number)
            elif kind == "remove" and seen:
                row = sorted(seen)[number % len(seen)]
                decodes.remove(row)
                del seen[row]
        beginning = [row for row, each in seen.items() if each.position % BLOCK_SIZE == 0]
        assert sorted(each.row for each in decodes.beginning()) == beginning
        assert decodes.beginning() == [], "each is told of once"
        for kind, number, _ in changes:
            if kind == "late" and seen:  # preempted while blocks were given out
                row = sorted(seen)[number % len(seen)]
                decodes.remove(row)
                del seen[row]
        assert list(decodes) == [each.sequence for each in seen.values()]
        assert all(decodes.position(row) == each.position for row, each in seen.items())
        step = decodes.take()
        assert step.sequences == [each.sequence for each in seen.values()]
        assert step.rows.tolist() == list(seen)
        assert step.starts.tolist() == [each.position for each in seen.values()]
        assert step.repeats <= (step.sequences == before)
        assert {each.row for each in step.completing} == {
            row for row, each in seen.items() if (each.position + 1) % BLOCK_SIZE == 0
        }
        ending = [row for row, each in seen.items() if each.position + 2 == each.sequence.max_length]
        assert [each.row for each in step.ending] == ending
        before = step.sequences
        for row in ending:
            del seen[row]
        for each in seen.values():
            each.position += 1
        assert len(decodes) == len(seen) and all(row in decodes for row in seen)
        assert sum(map(len, decodes._ending.values())) == sum(map(len, decodes._beginning.values())) == len(seen)
        assert len(decodes._ending) <= len(seen) + len(script), "what is past is forgotten"
        assert all(step >= decodes._step for step in decodes._ending)


def test_unchanged_sets_share_their_arrays() -> None:
    decodes = DecodeSet(NUM_ROWS, BLOCK_SIZE)
    decodes.add(seated(3, 2, 100), 2)
    decodes.add(seated(1, 5, 100), 5)
    first, second = decodes.take(), decodes.take()
    assert (first.repeats, second.repeats) == (False, True)
    assert second.rows is first.rows
    np.testing.assert_array_equal(second.starts, first.starts + 1)
    decodes.remove(3)
    third = decodes.take()
    assert not third.repeats and third.rows.tolist() == [1] and third.starts.tolist() == [7]


def test_a_row_that_changes_owners_is_not_told_of_for_the_former() -> None:
    decodes = DecodeSet(NUM_ROWS, BLOCK_SIZE)
    decodes.add(seated(0, 3, 100), 3)
    decodes.take()
    decodes.remove(0)
    newcomer = seated(0, 2, 4)
    decodes.add(newcomer, 2)
    assert decodes.beginning() == []
    decodes.take()
    assert decodes.beginning() == []
    assert decodes.take().completing == [newcomer]
    assert decodes.beginning() == [newcomer]
    assert decodes.take().ending == [newcomer]
    assert len(decodes) == 0
