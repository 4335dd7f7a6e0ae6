"""Every folder in tasks/ keeps what a task promises; nothing has to be registered."""

import os
import time
from pathlib import Path

import pytest

from rwkv_es.task import TEMPLATES, Problem, Task, list_tasks, load_task, opening

DATA = Path(os.environ.get("RWKV_ES_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
NEEDS_DATA = {"gsm8k": "gsm8k"}  # task -> its folder in the shared data
README_ROOT = Path(__file__).parents[1] / "tasks"
NUM_CHECKED = 200
CLOSING = {"": "", " <think": ">\n12 + 7 is odd.\n</think>\n\n", " <think>\n</think": ">\n"}  # what a model writes next

PIECES = ["(", ")", "9", ".", "-", "$", "#", "####", "\n", "\n\n", "<answer>", "</answer>", "<think>", "</think>"]
JUNK = [
    "",
    " ",
    "I do not know.",
    "nan",
    "inf",
    "\0",
    "\ud800",
    "九",
    "__import__('os').system('touch PROOF')",
    "open('PROOF','w')",
    "63**95**96",
    "9**9**9**9",
    "99999999!",
    "factorial(10**9)",
    "#### nan",
    "####",
    *(piece * (100_000 // len(piece)) for piece in PIECES),
]


@pytest.fixture(params=sorted(list_tasks()))
def task(request) -> Task:
    return load(request.param)


def load(name: str) -> Task:
    data = DATA / NEEDS_DATA[name] if name in NEEDS_DATA else ""
    if data and not data.is_dir():
        pytest.skip(f"{data} is not there; set RWKV_ES_DATA to the folder that holds it")
    return load_task(name, str(data))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_gold_answer_scores_one_bare_and_after_the_opening_of_the_template(task, split):
    start = opening(task.template)
    for problem in task.problems(split)[:NUM_CHECKED]:
        assert task.reward(problem, problem.answer) == 1.0
        assert task.reward(problem, start + CLOSING[start] + problem.answer) == 1.0
        assert not any(stop in problem.answer for stop in task.stop)


def test_every_opening_has_a_closing_here():
    assert {template.opening for template in TEMPLATES.values()} == set(CLOSING)


@pytest.mark.parametrize("text", JUNK, ids=lambda text: ascii(text[:12]))
def test_junk_scores_zero_at_once_and_touches_nothing(task, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problem = task.problems("test")[0]
    for given in (text, opening(task.template) + text):
        start = time.perf_counter()
        reward = task.reward(problem, given)
        assert time.perf_counter() - start < 0.05
        assert reward == 0.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_items_are_the_same_each_time_whatever_was_asked_before(task, split):
    first = task.problems(split)
    again = load(task.name).problems(split)
    assert len(first) == len(again)
    indices = [0, len(first) // 2, len(first) - 1]
    assert [again[i] for i in reversed(indices)] == [first[i] for i in indices][::-1]
    assert first[0] != first[1]


def test_the_splits_are_disjoint(task):
    train, test = task.problems("train"), task.problems("test")
    assert not {p.prompt for p in train[:2000]} & {p.prompt for p in test[:2000]}


def test_the_first_items_of_a_split_differ_from_each_other(task):
    prompts = [problem.prompt for problem in task.problems("train")[:NUM_CHECKED]]
    assert len(set(prompts)) > 0.9 * len(prompts)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("7 3 1 4", 1.0),
        (" 7 3  1 4\n", 1.0),
        ("7 3 1", 0.75),
        ("7 3 4 1", 0.5),
        ("7 3 1 4 1", 0.8),
        ("3 1 4", 0.0),
        ("7314", 0.0),
    ],
)
def test_copy_pays_the_right_start(text, reward):
    assert load_task("copy").reward(Problem("7 3 1 4:", "7 3 1 4"), text) == reward


@pytest.mark.parametrize("name", sorted(list_tasks()))
def test_the_readme_names_source_and_licence(name):
    text = (README_ROOT / name / "README.md").read_text("utf-8")
    assert text.startswith(f"# {name}\n")
    for word in ("**Source**", "**Licence**"):
        assert word in text
