"""Conversations as text: the format that the shipped chat template renders, written once more in Python.

`train.py` checks that the two agree. `<|im_end|>` ends a turn and `<|endoftext|>` a document; both end generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from corpus.phrasing import made_up_word

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
DOCUMENT_END = "<|endoftext|>"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role not in ['system', 'developer', 'user', 'assistant'] -%}
        {{- raise_exception('Unknown role: ' ~ message.role ~ '. Use system, developer, user or assistant.') -}}
    {%- endif -%}
    {{- '<|im_start|>' ~ ('system' if message.role == 'developer' else message.role) ~ '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- elif message.content -%}
        {%- for part in message.content -%}
            {{- part if part is string else part.text | default('', true) -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One question and its answer."""

    user: str
    assistant: str


def render(exchanges: Sequence[Exchange], *, system: str | None = None) -> str:
    turns = [] if system is None else [("system", system)]
    for exchange in exchanges:
        turns += [("user", exchange.user), ("assistant", exchange.assistant)]
    return "".join(f"{TURN_START}{role}\n{content}{TURN_END}\n" for role, content in turns) + DOCUMENT_END


SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful, honest assistant.",
    "You are a friendly assistant.",
    "You are a small demo model served by nanoserve.",
    "You are an assistant. Answer in short sentences.",
    "Answer the question.",
    "Answer briefly.",
    "Be concise.",
    "Be polite and brief.",
    "You are a kind teacher who answers questions for children.",
    "You are a storyteller.",
    "You are a chatbot. Be friendly and clear.",
    "You are a tutor. Help the student with simple questions.",
    "Today is a good day. Help the user.",
    "You are ChatBot, an AI assistant that answers questions about the world.",
    "",
)


def system_prompt(rng: Random) -> str | None:
    chance = rng.random()
    if chance < 0.6:
        return None
    if chance < 0.95:
        return rng.choice(SYSTEM_PROMPTS)
    role, topic = made_up_word(rng), made_up_word(rng)
    return rng.choice((f"You are {role.title()}, an assistant.", f"You are an expert in {topic}.", f"Session {role}."))
