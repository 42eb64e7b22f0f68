"""The text that the demo model is trained on: all of it written here, drawn from templates with a seed.

`documents(seed)` never ends; equal seeds give equal text. A document is a conversation in chat format or a plain story.
"""

from collections.abc import Callable, Iterator
from random import Random

from corpus.chat import DOCUMENT_END
from corpus.dialogues import conversation, greeting_only, story_conversation
from corpus.facts import FACTS
from corpus.phrasing import phrase
from corpus.stories import plain_story

__all__ = ["documents"]


def _plain_facts(rng: Random) -> str:
    """A few facts as running text, for text completion."""
    facts = [rng.choice(rng.choice(list(FACTS.values()))) for _ in range(rng.randint(1, 4))]
    return " ".join(phrase(rng, fact.answer) for fact in facts) + DOCUMENT_END


_DOCUMENTS: dict[Callable[[Random], str], float] = {
    conversation: 78,
    greeting_only: 2,
    story_conversation: 12,
    plain_story: 6,
    _plain_facts: 3,
}


def documents(seed: int) -> Iterator[str]:
    rng = Random(seed)
    makers, weights = list(_DOCUMENTS), list(_DOCUMENTS.values())
    while True:
        yield rng.choices(makers, weights)[0](rng)
