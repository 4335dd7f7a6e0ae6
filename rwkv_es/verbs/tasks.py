"""`rwkv-es tasks`: the built-in tasks, and what one of them sends and pays."""

from typing import Any

from rwkv_es.config.options import Config
from rwkv_es.errors import TaskError
from rwkv_es.measure import tables
from rwkv_es.reward.adapters import Answer, load_scorer
from rwkv_es.task.mixture import load_tasks
from rwkv_es.task.prompts import Prompting, prompt_of, response_prefix_of, stops_of
from rwkv_es.task.task import Task, list_tasks


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
        result = score_alone(scorer, Answer(problem, problem.answer, token_ids=()))
        print(f"{'<token 0>' if config.bos else ''}{prompt_of(task, problem, prompting)}")
        print(f"--- ends {_ends(part, prompting)}; at most {config.max_new_tokens or part.max_new_tokens} tokens")
        prefix = response_prefix_of(part, prompting)
        print(f"--- scored is {prefix!r} and what follows" if prefix else "--- scored is what follows", end="")
        paid = f"scores {result.reward}" if not result.error else f"fails: {result.error.splitlines()[-1]}"
        print(f"; the right answer ({paid}):\n{problem.answer}")


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
