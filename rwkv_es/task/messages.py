"""Messages with roles, as other libraries write prompts, and the problem that they ask."""

from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_es.task.task import SYSTEM

Messages = list[dict[str, Any]]


def messages_of(prompt: str | Sequence[Mapping[str, Any]]) -> Messages:
    """Return a prompt as messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]


def asked(messages: Sequence[Mapping[str, Any]]) -> tuple[str, dict[Any, Any]]:
    """Return the question that messages ask, earlier turns included, and what a problem's meta says of the system."""
    system = "\n".join(str(message["content"]) for message in messages if message["role"] == "system")
    others = [message for message in messages if message["role"] != "system"]
    if len(others) == 1:
        question = str(others[0]["content"])
    else:
        question = "\n".join(f"{str(message['role']).capitalize()}: {message['content']}" for message in others)
    return question, {SYSTEM: system} if system else {}


def wanted(function: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some arguments that a function names, or all if it takes any."""
    import inspect

    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(given)
    return {name: value for name, value in given.items() if name in parameters}
