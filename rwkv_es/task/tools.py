"""A loop of tools: what an answer writes between <name> and </name> goes to a function, whose result is the reply."""

import re
from collections.abc import Callable, Generator, Mapping
from typing import Any

from rwkv_es.task.task import Problem
from rwkv_es.task.turns import Done

Environment = Callable[[Problem], Generator[str | None, str, Done]]


def tool_loop(tools: Mapping[str, Callable[[str], Any]], reward: Callable[[Problem, str], float | None]) -> Environment:
    """Return an environment in which answers may call tools; the first answer that calls none is scored.

    A tool gets a text and returns anything; what it raises is told to the model in one line. An answer should end after
    the call: name the closing tags in STOP_INCLUDED.
    """
    call = re.compile(rf"<({'|'.join(map(re.escape, tools))})>(.*?)</\1>", re.DOTALL)

    def environment(problem: Problem) -> Generator[str | None, str, Done]:
        answer = yield None
        while calls := call.findall(answer):
            answer = yield "\n".join(f"<result>{_result(tools[name], text)}</result>" for name, text in calls)
        return Done(reward(problem, answer))

    return environment


def _result(tool: Callable[[str], Any], text: str) -> str:
    try:
        return str(tool(text))
    except Exception as error:  # noqa: BLE001  the model may mend its call
        return " ".join(f"error: {error or type(error).__name__}".split())
