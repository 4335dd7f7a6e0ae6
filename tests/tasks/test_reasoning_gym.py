"""Reasoning Gym: items are made once, and no scorer of the package ever runs what a model wrote."""

import importlib.util
import json

import pytest

from rwkv_es.errors import TaskError
from rwkv_es.reward.pool import RewardPool
from rwkv_es.task import load_task

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning_gym is not installed; it is in the extra tasks"
)
SMALL = json.dumps({"size": 5})
TOUCH = "__import__('os').system('touch PROOF')"
EXECUTE = [  # whose scorers in version 0.1.25 evaluate the answer, found by reading them
    *("countdown", "puzzle24", "polynomial_multiplication", "simple_integration", "intermediate_integration"),
    *("string_insertion", "spiral_matrix", "binary_matrix", "n_queens"),
]
SAFE = [
    "chain_sum",
    "number_sorting",
    "bitwise_arithmetic",
    "propositional_logic",
    "basic_arithmetic",
    "graph_color",
    "boxnet",
    "prime_factorization",
]


@pytest.fixture(autouse=True)
def few(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_ES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(load_task("reasoning_gym").reward.__globals__["problems"].__globals__["NUM_MADE"], "test", 3)


def test_items_are_made_once_and_read_from_the_cache(tmp_path, monkeypatch):
    first = load_task("reasoning_gym:chain_sum", SMALL).problems("train")
    files = sorted(file.name for file in (tmp_path / "cache" / "reasoning_gym").iterdir())
    assert len(first) == 5 and [file.split("-")[0] for file in files] == ["chain_sum"] * 2
    task = load_task("reasoning_gym:chain_sum", SMALL)
    monkeypatch.setitem(task.reward.__globals__, "_make", lambda *args: pytest.fail("made again"))
    assert task.problems("train") == first and isinstance(
        first[0].meta["item"]["metadata"]["difficulty"]["num_terms"], tuple
    )


@pytest.mark.parametrize("name", [*EXECUTE, *SAFE])
def test_the_gold_answer_pays_and_code_is_not_run(name, tmp_path, monkeypatch):
    task = load_task(f"reasoning_gym:{name}", SMALL)
    monkeypatch.chdir(tmp_path)
    for problem in [*task.problems("train"), *task.problems("test")]:
        known = name != "boxnet"
        assert task.reward(problem, f" <think>{TOUCH}</think>{problem.answer}") == known
        for code in (TOUCH, f"[{TOUCH}]", f"{TOUCH}*x"):
            assert task.reward(problem, f"<answer>{code}</answer>") < 0.5
        assert task.reward(problem, problem.answer.replace("<answer>", "")) == 0.0
    assert not (tmp_path / "PROOF").exists()


def test_an_answer_of_another_form_is_wrong_and_no_failure():
    for name in ("prime_factorization", "game_of_life_halting"):
        task = load_task(f"reasoning_gym:{name}", SMALL)
        for problem in task.problems("train"):
            assert task.reward(problem, problem.answer) == 1.0
            assert task.reward(problem, "<answer>neither</answer>") == 0.0


def test_scorers_that_may_execute_are_known():
    executes = load_task("reasoning_gym").reward.__globals__["score"].__globals__["executes"]
    assert all(map(executes, EXECUTE)) and not any(map(executes, SAFE))


def test_a_prompt_may_be_made_of_an_items_parts_and_options_reach_the_generator():
    data = json.dumps({"size": 4, "prompt": "{expression}=", "min_terms": 2, "max_terms": 2})
    problems = load_task("reasoning_gym:chain_sum", data).problems("train")
    assert all(problem.prompt == f"{problem.meta['item']['metadata']['expression']}=" for problem in problems)
    assert all(len(problem.prompt.split()) == 3 for problem in problems)


def test_it_is_scored_in_worker_processes():
    task = load_task("reasoning_gym:chain_sum", SMALL)
    problem = task.problems("train")[0]
    with RewardPool("reasoning_gym:chain_sum", SMALL, 1, 9.0, 1.0) as pool:
        assert pool.score([problem] * 2, [problem.answer, "<answer>x</answer>"]).rewards == [1.0, 0.0]


@pytest.mark.parametrize(
    ("spec", "data", "message"),
    [
        ("reasoning_gym", "", "names no generator"),
        ("reasoning_gym:chain_sun", "", "did you mean chain_sum"),
        ("reasoning_gym:chain_sum", "{", "is JSON of options"),
        ("reasoning_gym:chain_sum", "[]", "an object of options"),
        ("reasoning_gym:chain_sum", '{"no_such": 1}', "cannot be made with .*no_such"),
        (
            "reasoning_gym:chain_sum",
            '{"prompt": "{nothing}"}',
            "does not fit an item .*it may name question, .*expression",
        ),
        ("reasoning_gym:composite", "", "composite cannot be made"),
    ],
)
def test_what_is_wrong_is_said(spec, data, message):
    with pytest.raises(TaskError, match=message):
        load_task(spec, data).problems("test")


def test_a_broken_cache_is_named(tmp_path):
    load_task("reasoning_gym:chain_sum", SMALL).problems("test")
    for file in (tmp_path / "cache" / "reasoning_gym").iterdir():
        file.write_text("{")
    with pytest.raises(TaskError, match=r"cannot be read .*delete the file"):
        load_task("reasoning_gym:chain_sum", SMALL).problems("test")
