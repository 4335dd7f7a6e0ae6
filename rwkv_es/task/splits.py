"""Which of a task's problems are asked, and what is said of its splits."""

import sys
from collections.abc import Sequence

from rwkv_es.task.division import Side
from rwkv_es.task.mixture import Mixed, overlap
from rwkv_es.task.task import Problem, Task


def problems_to_ask(task: Task, split: str) -> Sequence[Problem]:
    """Return the problems of a split, or with "all" those of both."""
    if split != "all":
        return task.problems(split)
    train, test = task.problems("train"), task.problems("test")
    return test.whole if isinstance(test, Side) else [*train, *test]


def say_splits(task: Task, is_evaluated: bool = True) -> None:
    """Say on stderr how data without splits are divided; warn if held-out problems to ask are trained on too."""
    train = task.problems("train")
    say_division(train)
    for name, problems in task.judged_on() if is_evaluated else ():
        test = problems()
        if num_shared := overlap(train, test):
            of_set = f" of {name}" if name else ""
            print(
                f"rwkv-es: {num_shared} of the {len(test)} held-out problems{of_set} are also training problems; for "
                "an honest score pass --data with a folder of train.jsonl and test.jsonl that share none",
                file=sys.stderr,
            )


def say_division(problems: Sequence[Problem], hint: str = "") -> None:
    """Say on stderr how the data of these problems, or of parts of a mixture, were divided, if they were."""
    for part in problems.parts if isinstance(problems, Mixed) else (problems,):
        if isinstance(part, Side):
            print(f"rwkv-es: {part.words}{hint}", file=sys.stderr)
