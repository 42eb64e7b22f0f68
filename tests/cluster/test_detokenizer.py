"""Incremental detokenizing gives, token by token, what the tokenizer's decoder gives for the whole."""

import time
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.detokenizer import ByteDetokenizer, WindowDetokenizer, concatenates
from cluster.tokenizer import Tokenizer
from cluster.vocabulary import Vocabulary
from tests.cluster import tiny_tokenizers

FAMILIES = {
    "byte_level": tiny_tokenizers.byte_level,
    "sentence_piece": tiny_tokenizers.sentence_piece,
    "metaspace": tiny_tokenizers.metaspace,
    "word_piece": tiny_tokenizers.word_piece,
}
CONCATENATING = [name for name in FAMILIES if name != "word_piece"]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
token_lists = st.lists(st.integers(0, 2**16), max_size=40)


@cache
def tokenizer_of(name: str) -> Tokenizer:
    return tiny_tokenizers.make(FAMILIES[name]())


def pieces(tokenizer: Tokenizer, token_ids: list[int], **arguments: object) -> list[str]:
    detokenizer = tokenizer.detokenizer(**arguments)  # type: ignore[arg-type]
    return [*map(detokenizer.push, token_ids), detokenizer.flush()]


@pytest.fixture(scope="module", params=list(FAMILIES))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return tokenizer_of(request.param)


def test_the_families_take_the_path_made_for_them() -> None:
    for name in FAMILIES:
        kind = type(tokenizer_of(name).detokenizer())
        assert kind is (ByteDetokenizer if name in CONCATENATING else WindowDetokenizer)


def test_a_decoder_that_only_looks_familiar_is_found_out() -> None:
    """The probe is what decides: here token bytes are wrong for one letter, and the slow path must be taken."""

    class Wrong(Vocabulary):
        def token_bytes(self, token_id: int) -> bytes:
            return super().token_bytes(token_id).replace(b"l", b"L")

    backend = tiny_tokenizers.byte_level()
    assert concatenates(backend, Vocabulary(backend))
    assert not concatenates(backend, Wrong(backend))


@given(text=UNICODE)
@settings(deadline=None)
def test_any_text_comes_back_as_decoded(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    parts = pieces(tokenizer, token_ids)
    assert "".join(parts) == tokenizer.decode(token_ids, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@given(numbers=token_lists)
@settings(deadline=None, max_examples=200)
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("name", ["byte_level", "word_piece"])
def test_any_tokens_come_back_as_decoded(name: str, skip_special_tokens: bool, numbers: list[int]) -> None:
    tokenizer = tokenizer_of(name)
    token_ids = [number % (tokenizer.vocab_size + 3) for number in numbers]  # a few are no token at all
    text = "".join(pieces(tokenizer, token_ids, skip_special_tokens=skip_special_tokens))
    assert text == tokenizer.decode(token_ids, skip_special_tokens)


@given(numbers=token_lists)
@example(numbers=[18447, 45])  # the first is no token
@settings(deadline=None, max_examples=200)
@pytest.mark.parametrize("name", ["sentence_piece", "metaspace"])
def test_any_tokens_of_byte_fallback_come_back(name: str, numbers: list[int]) -> None:
    """As decoded; in a run of bytes that is malformed somewhere, whole characters stay instead of becoming U+FFFD."""
    tokenizer = tokenizer_of(name)
    token_ids = [number % (tokenizer.vocab_size + 3) for number in numbers]
    text = "".join(pieces(tokenizer, token_ids))
    decoded = tokenizer.decode(token_ids, skip_special_tokens=True)
    if "\ufffd" in decoded:
        hidden = tokenizer.vocabulary.special_ids
        raw = b"".join(tokenizer.vocabulary.token_bytes(i) for i in token_ids if i not in hidden)
        whole = raw.decode(errors="ignore").replace(" ", "")
        assert text.replace("\ufffd", "").replace(" ", "") == whole
    else:
        assert text == decoded


@pytest.mark.parametrize("name", list(FAMILIES))
def test_an_id_that_is_no_token_does_not_count_as_the_first_one(name: str) -> None:
    """A model's vocabulary may be padded beyond its tokenizer's: what then begins the text still loses its space."""
    tokenizer = tokenizer_of(name)
    token_ids = [tokenizer.vocab_size + 1, *tokenizer.encode("The dog", add_special_tokens=False)]
    assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids) == tokenizer.decode(token_ids[1:])


@pytest.mark.parametrize("name", ["sentence_piece", "metaspace"])
def test_truncated_bytes_become_one_mark_each_as_decoded(name: str) -> None:
    tokenizer = tokenizer_of(name)
    token_ids = tokenizer.encode("a東")[:-1] + tokenizer.encode(" b", add_special_tokens=False)
    text = "".join(pieces(tokenizer, token_ids))
    assert text == tokenizer.decode(token_ids, skip_special_tokens=True)
    assert text.count("\ufffd") == 2


@given(text=st.text("ab e.\n", min_size=1, max_size=30), data=st.data())
@settings(deadline=None)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_continued_text_fits_its_prompt(name: str, text: str, data: st.DataObject) -> None:
    """Prompt as decoded + completion = both decoded together: no space is lost or doubled where they meet."""
    tokenizer = tokenizer_of(name)
    token_ids = tokenizer.encode("x" + text, add_special_tokens=False)
    cut = data.draw(st.integers(1, len(token_ids)))
    prompt, completion = token_ids[:cut], token_ids[cut:]
    if tokenizer.decode(prompt).strip(" ") == "":
        return  # what a decoder makes of a lone space depends on what follows
    text = tokenizer.decode(prompt) + "".join(pieces(tokenizer, completion, after=prompt, skip_special_tokens=False))
    assert text == tokenizer.decode(token_ids)


def test_no_half_characters(tokenizer: Tokenizer) -> None:
    text = "東京 🙂👩‍👩‍👧 naïve"
    parts = pieces(tokenizer, tokenizer.encode(text))
    assert all("\ufffd" not in part for part in parts)
    if "[UNK]" not in tokenizer.decode(tokenizer.encode(text)):
        assert "🙂" in "".join(parts)


def test_an_unfinished_character_shows_only_at_the_end() -> None:
    tokenizer = tokenizer_of("byte_level")
    first, *_ = tokenizer.encode("😀", add_special_tokens=False)
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_hidden_unless_asked_for(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("yes<|im_end|>")
    assert "".join(pieces(tokenizer, token_ids)).strip() == "yes"
    assert "<|im_end|>" in "".join(pieces(tokenizer, token_ids, skip_special_tokens=False))


@pytest.mark.parametrize("kind", ["bytes", "window"])
def test_cost_is_linear_even_for_bytes_that_never_make_a_character(kind: str) -> None:
    """A model with random weights draws such; a window that only grows makes 16x the tokens cost 256x the time."""
    backend = tiny_tokenizers.byte_level()
    broken = backend.encode("😀", add_special_tokens=False).ids[1]
    assert backend.decode([broken]) == "\ufffd"
    vocabulary = Vocabulary(backend)

    def seconds(num_tokens: int) -> float:
        best = float("inf")
        for _ in range(3):
            hidden: frozenset[int] = frozenset()
            window = WindowDetokenizer(backend, hidden)
            detokenizer = window if kind == "window" else ByteDetokenizer(vocabulary, hidden)
            start = time.perf_counter()
            for _ in range(num_tokens):
                detokenizer.push(broken)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(8000) < 80 * seconds(500)


@given(text=UNICODE)
@settings(deadline=None)
def test_window_gives_what_bytes_give(text: str) -> None:
    """The readable twin: both ways agree where both apply. Bytes may show the beginning of a token sooner."""
    backend = tiny_tokenizers.byte_level()
    token_ids = backend.encode(text, add_special_tokens=False).ids
    fast, slow = ByteDetokenizer(Vocabulary(backend), frozenset()), WindowDetokenizer(backend, frozenset())
    fast_text = slow_text = ""
    for token_id in token_ids:
        fast_text += fast.push(token_id)
        slow_text += slow.push(token_id)
        assert fast_text.startswith(slow_text)
    assert fast_text + fast.flush() == slow_text + slow.flush()
