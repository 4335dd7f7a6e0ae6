"""Every folder in tasks/ keeps what a task promises; nothing has to be registered."""

import importlib.util
import json
import math
from functools import cache
from pathlib import Path

import pytest
from places import DATA, ROOT
from timing import cpu_seconds

from rwkv_es.environment.play import played
from rwkv_es.reward.pool import RewardPool
from rwkv_es.task import datasets
from rwkv_es.task.task import Problem, Task, list_tasks, load_task
from rwkv_es.task.templates import TEMPLATES, response_prefix

SPECS = {
    "reasoning_gym": "reasoning_gym:chain_sum",
    "text": "text:32",
    "reasoning_again": "reasoning_again:chain_sum",
}  # how a task is named where its folder's name is not enough
FILES = {"verifiers": "verifiers_sum.py", "trl_environment": "trl_counter.py"}  # of tests/data/environments
NEEDS_DATA = {"gsm8k": "gsm8k"}  # task -> its folder in the shared data
NEEDS_PACKAGE = {"math": "math_verify", "reasoning_gym": "reasoning_gym", "arithmetic_mini": "reasoning_gym"}
NEEDS_PACKAGE |= {"reasoning_again": "reasoning_gym"}
SUMS = {
    split: [(f"{a} + {b}?", str(a + b)) for a in range(first, 9, 2) for b in range(9)]
    for split, first in (("train", 0), ("test", 1))
}
OWN_DATA = ("svamp", "math", "jsonl", "aime", "text")  # tasks of no texts of their own: sums will do
README_ROOT = ROOT / "tasks"
NUM_CHECKED = 200
CLOSING = {  # what a model writes next
    "": "",
    " <think": ">\n12 + 7 is odd.\n</think>\n\n",
    "<think": ">\n12 + 7 is odd.\n</think>\n\n",
    " <think>\n</think": ">\n",
}

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data for the tasks that have none, and a cache for those that make theirs."""
    folder = tmp_path_factory.mktemp("data")
    for split, sums in SUMS.items():
        lines = [json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in sums]
        (folder / f"{split}.jsonl").write_text("".join(lines))
        (folder / f"{split}.txt").write_text("".join(f"{question} {answer}\n" for question, answer in sums))
    return folder


@pytest.fixture(params=sorted(list_tasks()))
def task(request, folder, monkeypatch) -> Task:
    keys = {datasets.question_hash(q): {"id": f"key-{i}", "answer": a} for i, (q, a) in enumerate(SUMS["test"])}
    monkeypatch.setattr(datasets, "aime_keys", lambda: keys)
    monkeypatch.setenv("RWKV_ES_CACHE", str(folder))
    return load(request.param, folder)


def load(name: str, folder: Path) -> Task:
    if name in FILES:
        return load_task(name, str(ROOT / "tests" / "data" / "environments" / FILES[name]))
    package = NEEDS_PACKAGE.get(name)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; see the extras in pyproject.toml")
    data = DATA / NEEDS_DATA[name] if name in NEEDS_DATA else folder if name in OWN_DATA else ""
    if data and not data.is_dir():
        pytest.skip(f"{data} is not there; set RWKV_ES_DATA to the folder that holds it")
    return load_task(SPECS.get(name, name), str(data))


@cache
def pool_of(name: str, folder: Path) -> RewardPool:
    """Return a pool for a task that is scored in worker processes only; a worker ends with this process."""
    return RewardPool(SPECS.get(name, name), str(folder) if name in OWN_DATA else "", 1, 5.0, 1.0)


def asked(task: Task, problem: Problem) -> str:
    """Return what tells a problem from others: of a text without a question, and of what is hidden, the answer too."""
    return problem.prompt + (problem.answer if task.environment is not None or not problem.prompt else "")


def score(task: Task, folder: Path, problem: Problem, text: str) -> float | None:
    """Score here, or where it can be killed; in an environment, a text is the answers of an episode, a line each."""
    if task.environment is not None:
        lines = "\n".join(text.split("\n")[: task.limits.turns])
        said = [each for _, each in played(task.environment, Problem(problem.prompt, lines, problem.meta))]
        assert not any(each.error for each in said), said
        return math.fsum(each.reward for each in said)
    if task.timeout_s == math.inf:
        return task.reward(problem, text)
    scores = pool_of(task.name.partition(":")[0], folder).score([problem], [text])
    assert scores.errors == scores.timeouts == 0, scores.first_error
    return scores.rewards[0]


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_gold_answer_scores_one_bare_and_after_the_opening_of_the_template(task, split, folder):
    start = response_prefix(task.template)
    for problem in task.problems(split)[:NUM_CHECKED]:
        if task.environment is not None and not problem.answer:
            continue  # of foreign ones none is known
        assert score(task, folder, problem, problem.answer) == 1.0
        if task.environment is not None:
            continue
        assert score(task, folder, problem, start + CLOSING[start] + problem.answer) == 1.0
        assert not any(stop in problem.answer for stop in task.stop)
        assert all(
            problem.answer.count(end) <= 1 and not problem.answer.partition(end)[2] for end in task.stop_included
        )


def test_every_opening_has_a_closing_here():
    assert {template.response_prefix for template in TEMPLATES.values()} == set(CLOSING)


@pytest.mark.parametrize("text", JUNK, ids=lambda text: ascii(text[:12]))
def test_junk_scores_zero_at_once_and_touches_nothing(task, text, folder, tmp_path, monkeypatch):
    if task.name in FILES:
        pytest.skip("the rewards are those of a file of another library's form")
    monkeypatch.chdir(tmp_path)
    problem = task.problems("test")[0]
    for given in (text, response_prefix(task.template) + text):
        assert score(task, folder, problem, given) == 0.0
        if task.timeout_s == math.inf:
            assert cpu_seconds(lambda given=given: score(task, folder, problem, given)) < 0.05
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_items_are_the_same_each_time_whatever_was_asked_before(task, split, folder):
    first = task.problems(split)
    again = load(task.name.partition(":")[0], folder).problems(split)
    assert len(first) == len(again)
    indices = [0, len(first) // 2, len(first) - 1]
    assert [again[i] for i in reversed(indices)] == [first[i] for i in indices][::-1]
    assert first[0] != first[1]


def test_the_splits_are_disjoint(task):
    train, test = task.problems("train"), task.problems("test")
    assert not {asked(task, p) for p in train[:2000]} & {asked(task, p) for p in test[:2000]}


def test_the_first_items_of_a_split_differ_from_each_other(task):
    prompts = [asked(task, problem) for problem in task.problems("train")[:NUM_CHECKED]]
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
