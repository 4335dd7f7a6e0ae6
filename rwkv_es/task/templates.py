"""Prompt templates: what stands around a question."""

import re
from typing import NamedTuple

from rwkv_es.system.errors import ConfigError


class Template(NamedTuple):
    """The prompt is `before` (with the question for {q}) + `response_prefix`; that and the completion are scored."""

    before: str
    response_prefix: str = ""
    stop: tuple[str, ...] = ()  # besides the task's own
    turn: str = "\n\nUser: {q}\n\nAssistant:"  # what stands around an environment's reply, before the response prefix


_TURN = "User: {q}\n\nAssistant:"
TEMPLATES: dict[str, Template] = {
    "chat": Template(_TURN),
    "think": Template(_TURN, " <think"),  # without ">": "<think>" would be tokens that the model was not trained on
    "short_think": Template(_TURN, " <think>\n</think"),
    "system": Template(_TURN),  # with a system text, which chat, think and short_think may have
    "assistant_think": Template(  # EGGROLL's prompt for Countdown and AIME, as published
        "User: You are a helpful assistant. You first think about the reasoning process in your mind and then "
        "provide the user with the answer. Question: {q}. Assistant:",
        " <think",
    ),
    "flower": Template("User✿{q}✿\nBot✿", "<think", ("✿",), "✿\nUser✿{q}✿\nBot✿"),
    "raw": Template("{q}", turn="{q}"),
}


def render(template: str, question: str, system: str = "", examples: str = "") -> str:
    """Return the prompt to send: system text, solved examples (as they are), question.

    Blank lines inside the question are closed up (not for "raw").

    Raises:
        ConfigError: unknown template, one that has no place for the system text, or that lacks it.
    """
    before, start, *_ = template_named(template)
    if system and not before.startswith("User: {q}"):
        raise ConfigError(f"the template {template} has no place for a system text; use system, think or short_think")
    if template == "system" and not system:
        raise ConfigError("the template system needs a text: --system TEXT")
    if template != "raw":
        question = without_blank_lines(question)
    header = f"System: {without_blank_lines(system)}\n\n" if system else ""
    return header + examples + before.replace("{q}", question) + start


def response_prefix(template: str) -> str:
    """Return the start of the model's answer that the prompt already holds, and that is scored with it.

    Raises:
        ConfigError: unknown template.
    """
    return template_named(template).response_prefix


def template_named(name: str) -> Template:
    """Return a template.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"unknown template {name!r}; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def unix_lines(text: str) -> str:
    """Return a text whose lines end in a line feed alone, whatever they ended in."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def without_blank_lines(text: str) -> str:
    """Close up the blank lines of a text, which end a turn."""
    return re.sub(r"\n(?:[^\S\n]*\n)+", "\n", unix_lines(text)).strip()
