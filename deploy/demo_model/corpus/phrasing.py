"""Templates with choices: "[Hello|Hi], {name}[!|.]" becomes one of four greetings.

Choices nest; braces are filled last, by `str.format`. Also the small matters of English that templates need: articles,
capitals, lists, and the many ways in which people type the same question.
"""

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import TypeAlias

Node: TypeAlias = "str | tuple[Node, ...] | list[Node]"  # text | a sequence | alternatives


def phrase(rng: Random, template: str, **values: object) -> str:
    text = _expand(_parse(template), rng)
    return text.format(**values) if "{" in text else text


@cache
def _parse(template: str) -> Node:
    node, end = _parse_sequence(template, 0)
    assert end == len(template), f"unbalanced brackets in {template!r}"
    return node


def _parse_sequence(template: str, start: int) -> tuple[Node, int]:
    parts: list[Node] = []
    text_start = position = start
    while position < len(template) and template[position] not in "|]":
        if template[position] != "[":
            position += 1
            continue
        parts.append(template[text_start:position])
        options: list[Node] = []
        while template[position] != "]":
            option, position = _parse_sequence(template, position + 1)
            options.append(option)
        parts.append(options)
        position += 1
        text_start = position
    parts.append(template[text_start:position])
    return tuple(parts), position


def _expand(node: Node, rng: Random) -> str:
    match node:
        case str():
            return node
        case tuple():
            return "".join([_expand(part, rng) for part in node])
        case list():
            return _expand(rng.choice(node), rng)


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def words(text: str) -> list[str]:
    return text.split()


def table(text: str) -> list[list[str]]:
    """Rows of a table written as text: one row a line, cells between bars."""
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


ONSETS = [*words("b br ch d dr f fl g gr h j k kl l m n p pr qu r s sh sk st t th tr v w y z zh cr pl sn tw x"), ""]
VOWELS = words("a e i o u ai ea ee ia io oo ou ar er or an en on al el")
ENDINGS = ["", "", "", *words("n r s t l m x th ck nd st sh ria land ton ix um")]


def made_up_word(rng: Random) -> str:
    """A word that nobody has seen: it teaches copying from the prompt, and saying "I don't know"."""
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((1, 2, 2, 3)))]
    return "".join(syllables) + rng.choice(ENDINGS)


def restyled(rng: Random, question: str) -> str:
    """The same question as another person would type it."""
    style = rng.random()
    if style < 0.5:
        return question
    if style < 0.62:
        return _lower_start(question)
    if style < 0.74:
        return question.rstrip("?.!")
    if style < 0.86:
        return question.lower().rstrip("?.!")
    if style < 0.88:
        return question.upper()
    if style < 0.95:
        prefix = rng.choice(
            ("Please tell me: ", "Hi! ", "Hey, ", "Hello. ", "Question: ", "I have a question. ", "Quick question: ")
        )
        return prefix + question
    return rng.choice(
        (f"{question} Please answer.", f"{question.rstrip('?.!')} please", f"Okay. {question}", f"{question} ")
    )


def _lower_start(question: str) -> str:
    return question[:1].lower() + question[1:] if not question.startswith("I ") else question
