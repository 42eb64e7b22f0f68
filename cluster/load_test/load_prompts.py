"""What a load generator asks: token ids where the vocabulary is known, and otherwise random words.

Token ids make prompts of exact length; words make them of about the wanted length, at `tokens_per_word` tokens each.
What a prompt really had is in the server's `usage`, and reports count that.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from tokenizers import Tokenizer as BackendTokenizer

from engine import ConfigError, SyntheticPrompts, Workload

# One token each in most vocabularies.
_WORDS: Final = (
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
)


class LoadPrompts(Protocol):
    """Prompts of a workload's requests, by their index; the same for the same index."""

    def prompt(self, workload: Workload, index: int) -> list[int] | str:
        """The prompt of one request."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompts:
    """Random token ids; requests that share blocks in the workload share those ids."""

    synthetic: SyntheticPrompts

    def prompt(self, workload: Workload, index: int) -> list[int]:
        """Exactly as many ids as planned."""
        return self.synthetic.token_ids(workload, index)


@dataclass(frozen=True, slots=True, kw_only=True)
class WordPrompts:
    """Random English words. Shared blocks become shared words."""

    seed: int = 0
    tokens_per_word: float = 1.0

    def prompt(self, workload: Workload, index: int) -> str:
        """About as many tokens as planned, at least one word."""
        synthetic = SyntheticPrompts(vocab_size=len(_WORDS), seed=self.seed)
        words = [_WORDS[token] for token in synthetic.token_ids(workload, index)]
        return " ".join(words[: max(1, round(len(words) / self.tokens_per_word))])


def vocabulary_size(folder: Path) -> int:
    """Tokens of the tokenizer in `folder`, special ones left out; raises `ConfigError`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"There is no tokenizer.json in {folder}.")
    return int(BackendTokenizer.from_file(str(path)).get_vocab_size(with_added_tokens=False))
