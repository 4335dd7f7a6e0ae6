"""A second task for the embedded model: what its questions are, and that tuning on some helps on the others."""

import importlib.util
import json
import re

import pytest

from rwkv_es.cli import main
from rwkv_es.pretrained.checkpoint import resolve
from rwkv_es.pretrained.tokenizer import load_tokenizer
from rwkv_es.task import load_task

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning_gym is not installed; it is in the extra tasks"
)
RECIPE = "rwkv_es/tiny/arithmetic.yaml"
STEPS = 8


def numbers(problem):
    x, sign, y = re.fullmatch(r":(\d+)([-+*])(\d+)=", problem.prompt).groups()
    return int(x), sign, int(y)


def test_every_question_is_there_once_with_its_result():
    task = load_task("arithmetic_mini")
    found = {numbers(p): int(p.answer) for split in ("train", "test") for p in task.problems(split)}
    ten = range(1, 11)
    wanted = {(x, "+", y): x + y for x in ten for y in ten} | {(x, "*", y): x * y for x in ten for y in ten}
    wanted |= {(x, "-", y): x - y for x in ten for y in range(1, x + 1)}
    assert found == wanted
    assert sum(len(task.problems(split)) for split in ("train", "test")) == len(wanted) == 255


def test_numbers_that_change_places_stay_in_their_split():
    splits = [
        {(*sorted((x, y)), s) for x, s, y in map(numbers, load_task("arithmetic_mini").problems(split))}
        for split in ("train", "test")
    ]
    assert not splits[0] & splits[1]


def test_the_embedded_model_can_read_and_write_all_of_it():
    task, tokenizer = load_task("arithmetic_mini"), load_tokenizer("auto", resolve("tiny"), 115)
    for problem in (*task.problems("train"), *task.problems("test")):
        assert len(tokenizer.encode(problem.prompt)) == 5 and len(tokenizer.encode(problem.answer)) == 1


@pytest.mark.parametrize(
    "text, reward", [("21", 1), ("21.0", 0), (" 21", 1), ("2", 0), ("211", 0), ("3*7", 0), ("", 0)]
)
def test_only_the_result_alone_pays(text, reward):
    task = load_task("arithmetic_mini")
    problem = next(p for s in ("train", "test") for p in task.problems(s) if p.prompt == ":3*7=")
    assert task.reward(problem, text) == reward


def tuned(folder, **options):
    """Tune the embedded model by the recipe; return the held-out accuracy before and after."""
    given = {"run": folder, "threads": 1, "tracker": "none", "device": "cpu", **options}
    assert main(["train", "--config", RECIPE, *(f"--{name}={value}" for name, value in given.items())]) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]


def test_a_few_steps_on_some_problems_help_on_the_others(tmp_path):
    before, after = tuned(tmp_path / "run", steps=STEPS, population=48, prompts=16, eval_every=STEPS)
    assert 0.2 < before < 0.4
    assert after > before + 0.15, "three times the standard error of 101 problems"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_recipe_gets_nearly_all_right(tmp_path, seed):
    before, after = tuned(tmp_path / "run", seed=seed)
    assert before < 0.4 and after > 0.85
