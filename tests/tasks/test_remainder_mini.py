"""The task of long answers: its answers by hand, its reward, and how long they are."""

import pytest

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Problem, load_task
from tasks.remainder_mini.task import differences, worked_answer


def test_a_worked_answer_writes_every_difference():
    assert worked_answer(37, 9) == "-037,028,019,010,001=1"
    assert differences(20, 5) == "020,015,010,005,000=0"


@pytest.mark.parametrize(
    ("text", "reward"),
    [("-861,852=6", 1), ("=6", 1), ("=5=6", 1), ("=6\n", 1), ("6", 0), ("=7", 0), ("=6=5", 0), ("=06", 0), ("=6,", 0)],
)
def test_what_stands_after_the_last_sign_is_paid(text, reward):
    problem = Problem("861%9:", "", {"number": 861, "divisor": 9})  # 861 = 95 * 9 + 6
    assert load_task("remainder_mini").reward(problem, text) == reward


def test_answers_have_hundreds_of_tokens_and_a_careless_one_is_seldom_right():
    task = load_task("remainder_mini")
    problems = [*task.problems("train"), *task.problems("test")]
    lengths = [len(problem.answer) + 1 for problem in problems]  # a token a sign, and the end
    assert len(problems) == 840 and min(lengths) == 311 and max(lengths) == 403 <= task.max_new_tokens
    careless = [differences(p.meta["number"], p.meta["divisor"] + 1) for p in problems]
    assert min(map(len, careless)) >= 256
    right = sum(task.reward(problem, text) for problem, text in zip(problems, careless))
    assert right == sum(
        p.meta["number"] % p.meta["divisor"] == p.meta["number"] % (p.meta["divisor"] + 1) for p in problems
    )
    assert right / len(problems) < 0.15
    assert 0.15 < len(task.problems("test")) / 840 < 0.25


def test_the_task_takes_no_data():
    with pytest.raises(TaskError, match="no data; got 'here'"):
        load_task("remainder_mini", "here").problems("train")
