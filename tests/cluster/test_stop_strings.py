"""Stop strings end a text at the same place however it is cut into tokens, and never show their beginning."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.stop_strings import StopStrings

letters = st.text("ab\n", max_size=20)
stops_lists = st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4)


def expected(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """Character by character: the first moment at which the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end if include else end - max(found)], True
    return text, False


@given(parts=st.lists(letters, max_size=8), stops=stops_lists, include=st.booleans())
def test_equals_looking_at_the_whole_text(parts: list[str], stops: list[str], include: bool) -> None:
    matcher = StopStrings(stops, include)
    shown, hit = "", False
    for part in parts:
        new, hit = matcher.push(part)
        shown += new
        if hit:
            break
        # What is shown may never have to be taken back.
        assert "".join(parts).startswith(shown)
    if not hit:
        shown += matcher.flush()
    assert (shown, hit) == expected("".join(parts), stops, include)


@given(parts=st.lists(letters, max_size=8), stops=stops_lists)
def test_holds_back_no_more_than_needed(parts: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    seen = shown = ""
    for part in parts:
        new, hit = matcher.push(part)
        seen += part
        shown += new
        if hit:
            return
        held = max((n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0)
        assert shown == seen[: len(seen) - held]


@pytest.mark.parametrize(
    ("parts", "stops", "shown"),
    [
        (["Hel", "lo\nUs", "er", ": hi"], ["\nUser:"], ["Hel", "lo", "", ""]),
        (["a<", "/", "b"], ["</s>"], ["a", "", "</b"]),
        (["abab", "abac"], ["ababac"], ["", "ab"]),
        (["aXb", "c"], ["b", "Xbc"], ["a"]),
    ],
)
def test_examples(parts: list[str], stops: list[str], shown: list[str]) -> None:
    matcher = StopStrings(stops)
    got = []
    for part in parts:
        text, hit = matcher.push(part)
        got.append(text)
        if hit:
            break
    if stops == ["b", "Xbc"]:
        assert got == ["aX"]  # "b" is complete before "Xbc" is
    else:
        assert got == shown


def test_unarmed_stop_strings_do_not_count_but_may_begin_then() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("an END, E", armed=False) == ("an END, ", False)
    assert matcher.push("ND more") == ("", True)


def test_an_unarmed_stop_string_may_be_the_beginning_of_the_next() -> None:
    matcher = StopStrings(["aa"])
    assert matcher.push("xaa", armed=False) == ("xa", False)
    assert matcher.push("a") == ("", True)


def test_without_stop_strings_everything_passes() -> None:
    matcher = StopStrings(())
    assert matcher.push("anything") == ("anything", False)
    assert matcher.flush() == ""


def test_a_hostile_stop_string_costs_no_more_than_its_length() -> None:
    """A thousand characters that always almost match: quadratic search would take seconds."""
    matcher = StopStrings(["a" * 1000 + "b"] * 4)
    start = time.perf_counter()
    for _ in range(20_000):
        matcher.push("a")
    assert time.perf_counter() - start < 2
