"""`Tokenizer`: text and conversations to token ids and back, over the tokenizer files of a checkpoint.

Encoding goes straight to the Rust tokenizer (tens of microseconds for a short text). Knows no requests and no models;
`TokenizerFiles` knows how the files are read, `ChatTemplate` how a conversation becomes text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer

from cluster.api_error import ApiError
from cluster.chat_template import RESERVED, ChatTemplate
from cluster.detokenizer import ByteDetokenizer, IncrementalDetokenizer, WindowDetokenizer, concatenates
from cluster.tokenizer_files import TokenizerFiles
from cluster.vocabulary import Vocabulary


class Tokenizer:
    """Made by `load`. `max_len` is the checkpoint's own limit in tokens, None where it names none."""

    def __init__(self, files: TokenizerFiles) -> None:
        self._backend: BackendTokenizer = files.backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocabulary = Vocabulary(self._backend)
        self._concatenates = concatenates(self._backend, self.vocabulary)
        template = files.chat_template
        self._chat_template = None if template is None else ChatTemplate(template, files.special_tokens)
        self._knows_developer = "developer" in str(template)
        self.vocab_size = self.vocabulary.size
        self.bos_token_id = self._token_id(files, "bos_token")
        self.eos_token_id = self._token_id(files, "eos_token")
        self.max_len = files.max_len

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read the tokenizer of the checkpoint in directory `path`; raises `CheckpointError` where there is none."""
        return cls(TokenizerFiles.read(path))

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded."""
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, by default with what the tokenizer adds on its own (a leading BOS, for example)."""
        # The batch call, for it releases the interpreter lock (a long prompt would stop every stream of the process)
        # and, in its fast form, skips the character offsets that nobody reads.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        token_ids: list[int] = encoding.ids
        return token_ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; the template writes the special tokens, so none are added. See `render_chat`."""
        return self.encode(self.render_chat(messages, add_generation_prompt, template_arguments), False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the model's chat template writes it; raises `ApiError` (400) with its complaint."""
        if self._chat_template is None:
            message = "This model has no chat template. Use /v1/completions with a prompt instead."
            raise ApiError.invalid(message, "messages", "no_chat_template")
        arguments = dict(template_arguments or {})
        if reserved := sorted(RESERVED & arguments.keys()):
            parameter = f"chat_template_kwargs.{reserved[0]}"
            raise ApiError.invalid(f"{parameter} is reserved by the server; leave it out.", parameter)
        if not self._knows_developer:
            messages = [_as_system(message) for message in messages]
        try:
            text = self._chat_template.render(messages, add_generation_prompt, arguments)
            text.encode()  # half a surrogate pair, out of a tool call's JSON, is no text
        except Exception as error:  # templates are programs: what a conversation makes them raise is not bounded
            message = f"The model's chat template rejected the conversation: {error}"
            raise ApiError.invalid(message, "messages", "chat_template_error") from error
        return text

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of whole token ids, without any clean-up of spaces."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> IncrementalDetokenizer:
        """For a text that begins, or that goes on from the tokens `after` (a completion's prompt)."""
        hidden_ids: frozenset[int] = self.vocabulary.special_ids if skip_special_tokens else frozenset()
        if self._concatenates:
            return ByteDetokenizer(self.vocabulary, hidden_ids, continues=bool(after))
        return WindowDetokenizer(self._backend, hidden_ids, after)

    def _token_id(self, files: TokenizerFiles, name: str) -> int | None:
        text = files.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)


def _as_system(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A developer message under the older name, for templates that were written before there was another."""
    return {**message, "role": "system"} if message["role"] == "developer" else message
