"""`rwkv-es tasks`: the built-in tasks, and what one of them sends and pays."""

import math
from collections.abc import Iterator
from typing import Any

from rwkv_es.config.options import Config
from rwkv_es.reward.adapters import Answer, load_scorer
from rwkv_es.system import tables
from rwkv_es.system.errors import TaskError
from rwkv_es.task.mixture import load_tasks
from rwkv_es.task.prompts import Prompting, prompt_of, response_prefix_of, stops_of
from rwkv_es.task.task import Problem, Task, list_tasks


def print_tasks() -> None:
    """Print a line for each built-in task."""
    tables.show(("", ""), list(list_tasks().items()))


def show_task(config: Config) -> None:
    """Print the first problem (of a mixture: of every part) as it is sent, and what its answer scores."""
    from rwkv_es.reward.worker import score_alone

    task = load_tasks(config.task, config.data)
    prompting = Prompting(config.template, config.system, config.shots)
    scorer = load_scorer(task, config.reward, config.reward_signature)
    problems = _problems_of(task)
    for part in task.parts or (task,):
        problem = next(problem for problem in problems if task.part_of(problem) is part)
        print(f"{'<token 0>' if config.bos else ''}{prompt_of(task, problem, prompting)}")
        print(f"--- ends {_ends(part, prompting)}; at most {config.max_new_tokens or part.max_new_tokens} tokens")
        if part.environment is not None:
            print("\n".join(_episode(part, problem)))
            continue
        result = score_alone(scorer, Answer(problem, problem.answer, token_ids=()))
        prefix = response_prefix_of(part, prompting)
        print(f"--- scored is {prefix!r} and what follows" if prefix else "--- scored is what follows", end="")
        paid = f"scores {result.reward}" if not result.error else f"fails: {result.error.splitlines()[-1]}"
        print(f"; the right answer ({paid}):\n{problem.answer}")


def _episode(part: Task, problem: Problem) -> Iterator[str]:
    """Yield an episode's limits and, line by line, the one that earns 1, as far as it is known."""
    from rwkv_es.environment.play import played

    yield f"--- an environment replies; at most {part.limits.turns} answers and {part.limits.tokens} tokens"
    turns = played(part.environment, problem) if part.environment and problem.answer else []
    for answer, said in turns:
        yield f"→ {answer}\n← {said.cause or said.text.rstrip() or '(end)'}"
    if turns:
        yield f"--- this episode earns {math.fsum(said.reward or 0.0 for _, said in turns):g}"


def _ends(part: Task, prompting: Prompting) -> str:
    """Say where an answer ends, besides by its length."""
    before = [f"before {string!r}" for string in stops_of(part, prompting)]
    return ", ".join([*before, *(f"after {string!r}" for string in part.stop_included), "at token 0"])


def _problems_of(task: Any) -> Any:
    """Return the training problems, or, if there are none (AIME), the test problems."""
    try:
        return task.problems("train")
    except TaskError:
        return task.problems("test")
