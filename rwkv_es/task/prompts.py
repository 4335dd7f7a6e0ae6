"""The whole prompt of a problem: template, system text and solved examples before it; and where its answer ends."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from rwkv_es.system.errors import ConfigError
from rwkv_es.system.texts import read_text
from rwkv_es.task.task import SYSTEM, Problem, Task
from rwkv_es.task.templates import render, response_prefix, template_named, unix_lines

_GAP = "\n\n"  # between an example and what follows


class Prompting(NamedTuple):
    """What the options say about prompts; every problem is asked in the way of its own task if they say nothing."""

    template: str = "auto"
    system: str = ""
    shots: str = "0"  # how many solved problems of the train split come first, or a text file that does


def template_of(task: Task, prompting: Prompting) -> str:
    """Return the template that a task's problems are asked in."""
    return task.template if prompting.template == "auto" else prompting.template


def prompt_of(task: Task, problem: Problem, prompting: Prompting) -> str:
    """Return what is sent for a problem of a task, or of a mixture.

    Raises:
        ConfigError: the template, the system text or the examples do not fit.
    """
    task = task.part_of(problem)
    template = template_of(task, prompting)
    system = problem.meta.get(SYSTEM, "") or prompting.system
    return render(template, problem.prompt, system, _examples(task, problem, template, prompting.shots))


def stops_of(task: Task, prompting: Prompting) -> tuple[str, ...]:
    """Return the strings before which an answer of a task (no mixture) ends."""
    return task.stop + template_named(template_of(task, prompting)).stop


def response_prefix_of(task: Task, prompting: Prompting) -> str:
    """Return the start of the answers to a task's problems that the prompt already holds."""
    return response_prefix(template_of(task, prompting))


def reference_of(task: Task, problem: Problem, prompting: Prompting) -> tuple[str, bool]:
    """Return what a model that knows the answer writes after the prompt; and whether a stop string ends it.

    In templates that open the thinking it is empty, unless the answer itself begins with some.
    """
    task = task.part_of(problem)
    template, start = template_of(task, prompting), response_prefix_of(task, prompting)
    stops = template_named(template).stop or task.stop
    if template == "raw":
        text = problem.answer
    elif start and not problem.answer.startswith("<think>"):
        text = f"{' ' if start.startswith(' ') else ''}<think>\n</think>\n{problem.answer}"
    else:
        text = problem.answer if start == "<think" else f" {problem.answer}"
    return text.removeprefix(start) + (stops[0] if stops else ""), bool(stops)


def turn_of(task: Task, prompting: Prompting) -> str:
    """Return what is read between two answers, with an environment's reply for {q}."""
    template = template_named(template_of(task, prompting))
    return template.turn + template.response_prefix


def is_count(shots: str) -> bool:
    """Tell a number of shots from a text file of them."""
    return shots.isascii() and shots.isdecimal()


def _examples(task: Task, problem: Problem, template: str, shots: str) -> str:
    if not is_count(shots):
        return _text_of(shots)
    count = int(shots)
    if not count:
        return ""
    found = _first_problems(task, count + 1)
    others = [example for example in found if example.prompt != problem.prompt]  # nobody is shown his own answer
    if len(others) < count:
        raise ConfigError(f"shots is {count}, but task {task.name} has only {len(others)} other training problems")
    return "".join(_solved(template, example) for example in others[:count])


def _solved(template: str, problem: Problem) -> str:
    """Write a problem with its answer as a turn without thinking."""
    if template == "raw":
        return f"{problem.prompt}{problem.answer}{_GAP}"
    if template == "flower":
        return f"{render(template, problem.prompt).removesuffix(response_prefix(template))}{problem.answer}✿\n"
    return f"{render('chat', problem.prompt)} {problem.answer}{_GAP}"


@lru_cache(maxsize=16)
def _first_problems(task: Task, count: int) -> Sequence[Problem]:
    return task.problems("train")[:count]


@lru_cache(maxsize=1)
def _text_of(file: str) -> str:
    text = unix_lines(read_text(file, "shots must be a number or a text file:", 16 << 20))
    return text.rstrip("\n") + _GAP
