"""`StopStrings`: finding where a growing text must end, without letting a reader see the beginning of a stop string.

One Knuth-Morris-Pratt automaton per stop string (Knuth, Morris, Pratt 1977), fed a character at a time, so the cost
is linear however long the stop strings are, and the result does not depend on how the text was cut into tokens:
the stop string that is complete first ends the text. It knows no tokens.
"""

from collections.abc import Sequence


class StopStrings:
    """Holds back the longest end of the text that may become a stop string. With `include` a hit stays in the text."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._failures = [_failure_function(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._first_characters = frozenset(stop[0] for stop in self._stops)
        self._include = include
        self._held = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, bool]:
        """The text that is safe to show now, and whether a stop string ended it. Unarmed, no stop string counts.

        After a hit the instance is spent. `armed` concerns stop strings that end inside `text`.
        """
        if not self._held and self._first_characters.isdisjoint(text):
            return text, False
        seen = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            hit = self._advance(character, armed)
            if hit:
                return seen[: end if self._include else end - hit], True
        num_held = max(self._matched, default=0)
        self._held = seen[len(seen) - num_held :]
        return seen[: len(seen) - num_held], False

    def flush(self) -> str:
        """The held text, once it is known that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str, armed: bool) -> int:
        """Feed one character; the length of the longest stop string that it completes, else 0."""
        hit = 0
        for i, stop in enumerate(self._stops):
            matched, failure = self._matched[i], self._failures[i]
            while matched and stop[matched] != character:
                matched = failure[matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                if armed:
                    hit = max(hit, matched)
                matched = failure[matched - 1]
            self._matched[i] = matched
        return hit


def _failure_function(stop: str) -> list[int]:
    """For each i the length of the longest proper prefix of `stop` that also ends `stop[: i + 1]`."""
    failure = [0] * len(stop)
    matched = 0
    for i in range(1, len(stop)):
        while matched and stop[i] != stop[matched]:
            matched = failure[matched - 1]
        if stop[i] == stop[matched]:
            matched += 1
        failure[i] = matched
    return failure
