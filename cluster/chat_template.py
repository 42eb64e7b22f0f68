"""`ChatTemplate`: a checkpoint's Jinja template, which makes of a conversation the text that the model was trained on.

Renders what `transformers` would (its `apply_chat_template`), whose import costs seconds in every process that needs a
tokenizer. Templates are programs of strangers: they run in Jinja's immutable sandbox and see plain JSON values only.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

# Variables that the server sets, and arguments by which `transformers` would be told to do something else.
RESERVED: Final = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "kwargs",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing, the one templates read first


class ChatTemplate:
    """Compiled when first used. `special_tokens` are variables of the template: bos_token, eos_token, ..."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._render: Callable[..., str] | None = None

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, arguments: Mapping[str, Any]
    ) -> str:
        """The conversation as text. Raises whatever the template does; arguments win over special tokens."""
        if not messages:
            raise ValueError("a conversation needs at least one message")
        if self._render is None:
            self._render = _compile(self.source)
        return self._render(
            messages=[_with_reasoning(_plain(_without_none(message))) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**self._special_tokens, **_plain(arguments)},
        )


def _without_none(message: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's clients send `"content": null`, which templates would write as "None"."""
    return {key: value for key, value in message.items() if value is not None}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """What a model thought, under the names that templates know it by."""
    thought = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _plain(value: Any) -> Any:
    """A copy of nothing but JSON's own types, so that a template finds no method that is not theirs."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    for kind in (bool, str, int, float):
        if isinstance(value, kind):
            return kind(value) if kind is not str else str.__str__(value)
    return None if value is None else f"<{type(value).__name__}>"


def _compile(source: str) -> Callable[..., str]:
    """The template's render function in an environment like that of `transformers`; raises `TemplateSyntaxError`."""
    import jinja2  # only processes that render need it
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.sandbox
    import jinja2.utils

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks for training what the model wrote: here it says nothing."""

        tags = {"generation"}  # noqa: RUF012  # Jinja's interface

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """No attribute that Python itself would use."""

        def __init__(*values: Any, **named: Any) -> None:
            self, *others = values
            attributes = dict(*others, **named)
            for name in attributes:
                _check_attribute(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_attribute(name)
            super().__setitem__(name, value)

    def _check_attribute(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own is for HTML
    environment.globals |= {
        "dict": _Dictionaries(),
        "namespace": Namespace,
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment.from_string(source).render


class _Dictionaries:
    """`dict` as templates may use it, without the class and what hangs on it."""

    def __call__(self, *values: Any, **named: Any) -> dict[Any, Any]:
        return dict(*values, **named)

    def fromkeys(self, *values: Any) -> dict[Any, Any]:
        return dict.fromkeys(*values)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
