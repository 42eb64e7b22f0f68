"""Conversations become the text that `transformers` makes of them, template feature by template feature."""

import inspect
from typing import Any

import pytest

from cluster.chat_template import RESERVED, ChatTemplate
from tests.cluster import tiny_tokenizers

TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"city": "Zürich", "n": [1, 2.5]}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "<b>東京</b>?"}, {"type": "image_url", "image_url": {"u": 1}}],
    },
    {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL], "name": None},
    {"role": "tool", "content": "4", "tool_call_id": "c1"},
    {"role": "assistant", "content": " yes ", "reasoning": "hm"},
]
LOOP = "{% for message in messages %}"
TEMPLATES = {
    "chatml": tiny_tokenizers.CHATML,
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token | default('none') }}",
    "whitespace": "  {% if true %}\n   a  \n  {%- endif %}  \n b\n" + LOOP + "\n  {{ message.role }}\n{% endfor %}\n",
    "json": "{{ messages | tojson }} {{ messages[2] | tojson(indent=2) }}"
    "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
    "loop controls": LOOP
    + "{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ message.role }}{% if loop.index == 3 %}"
    "{% break %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, text='') %}" + LOOP + "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "generation": LOOP + "{% set who = message.role %}{% generation %}{{ who }}: {{ message.content }}\n"
    "{% endgeneration %}{% endfor %}",
    "missing keys": LOOP
    + "{{ 'content' in message }} {{ message.content is string }} {{ message.nothing }};{% endfor %}",
    "reasoning": "{{ messages[4].reasoning_content }} {{ messages[4].thinking }}",
    "no tools": "{{ tools is none }} {{ documents is none }} {{ tools is defined }} {% if not tools %}none{% endif %}",
    "dict": "{{ dict(a=1) }} {{ dict.fromkeys(['x'], 2) }}",
    "macro": "{% macro show(m, end='.') %}{{ m.role | upper }}{{ end }}{% endmacro %}"
    + LOOP
    + "{{ show(message) }}{% endfor %}",
    "methods": "{{ messages[4].content.strip() }} {{ messages[0].content.split(' ')[-1] }} "
    "{{ messages[2].tool_calls[0].function.arguments.items() | list }} {{ messages[::-1][0].role }}",
    "arguments": "{{ style }} {{ flag }} {{ nested.a[0] }} {{ bos_token }}",
    "time": "{{ strftime_now('%Y') }}",
    "filters": "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ '<&>' }} {{ ' x ' | trim }}",
}
ARGUMENTS = {"style": "terse", "flag": False, "nested": {"a": [1]}}


def reference(template: str) -> Any:
    return tiny_tokenizers._pretrained(tiny_tokenizers.byte_level(), template)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("prompted", [True, False])
def test_as_transformers_renders(template: str, prompted: bool) -> None:
    expected = reference(template).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=prompted, **ARGUMENTS
    )
    chat_template = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"})
    assert chat_template.render(MESSAGES, prompted, ARGUMENTS) == expected
    assert expected.strip(), "a template that writes nothing shows nothing"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].__class__ }}{{ messages[0].__class__.__mro__ }}",
        "{% set ns = namespace(a=1) %}{% set ns.__class__ = 2 %}",
        "{{ namespace(_x=1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ raise_exception('no') }}",
        "{% include 'file' %}",
        "{{ messages[0].content.format(messages) + 1 }}",
    ],
)
def test_what_transformers_refuses_is_refused(template: str) -> None:
    with pytest.raises(Exception, match=r".") as expected:
        reference(template).apply_chat_template(MESSAGES, tokenize=False)
    with pytest.raises(type(expected.value)):
        ChatTemplate(template, {}).render(MESSAGES, False, {})


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one message"):
        ChatTemplate("x", {}).render([], True, {})


def test_every_argument_of_transformers_is_reserved() -> None:
    assert inspect.signature(reference("x").apply_chat_template).parameters.keys() <= RESERVED


def test_values_of_other_types_are_not_the_templates_to_play_with() -> None:
    class Text(str):
        def escape(self) -> str:
            return "escaped"

    chat_template = ChatTemplate("{{ messages[0].content.escape }}{{ thing }}", {})
    assert chat_template.render([{"role": "user", "content": Text("a")}], False, {"thing": object()}) == "<object>"
