"""Reasoning Gym: items are made once, and no scorer of the package ever runs what a model wrote."""

import importlib.util
import json
import math

import pytest

from rwkv_es.reward.pool import RewardPool
from rwkv_es.system.errors import TaskError
from rwkv_es.task import Problem, load_task

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


NOTHING = [
    *(
        "",
        " ",
        "\n",
        "nan",
        "NaN",
        "-nan",
        "nan+nanj",
        "nanj",
        "inf",
        "-inf",
        "Infinity",
        "1e999",
        "-1e999i",
        "9" * 400,
    ),
    *(
        "[nan]",
        "nan, nan",
        "(nan, nan)",
        '{"x": NaN}',
        "nan/1",
        "\\frac{nan}{1}",
        "1e400 + 1e400j",
        "NaN%",
        "$nan",
        "nan.",
    ),
]


def generators() -> list[str]:
    if importlib.util.find_spec("reasoning_gym") is None:
        return []
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS.keys() - {"composite"})  # needs others to be made of


@pytest.mark.slow  # 20 s for all 104
@pytest.mark.filterwarnings("ignore")  # of the package's own making
@pytest.mark.parametrize("name", generators())
def test_no_generator_pays_what_is_no_answer(name):
    pays_nothing(name)


@pytest.mark.parametrize("name", ["complex_arithmetic", "decimal_arithmetic", "gcd", "pool_matrix", "spell_backward"])
def test_what_is_no_answer_pays_nothing(name):
    pays_nothing(name)


def pays_nothing(name):
    import reasoning_gym

    items = [item for item, _ in zip(reasoning_gym.create_dataset(name, size=3, seed=5), range(3))]
    reward = load_task("reasoning_gym").reward
    for item in items:
        problem = Problem("", "", {"generator": name, "item": item})
        assert {text: paid for text in NOTHING if (paid := reward(problem, f"<answer>{text}</answer>"))} == {}


@pytest.mark.parametrize(
    ("answer", "paid"),
    [
        ("0.109375", 1.0),
        ("7/64", 1.0),
        (r"\frac{7}{64}", 1.0),
        ("0.10938", 1.0),
        ("0", 0.0),
        ("0.1", 0.0),
        ("0.109", 0.0),
        ("1e999999999", 0.0),
    ],
)
def test_a_probability_is_not_paid_for_its_first_digits(answer, paid):
    item = {"question": "", "answer": "0.109375", "metadata": {}}
    reward = load_task("reasoning_gym").reward
    assert reward(Problem("", "", {"generator": "coin_flip", "item": item}), f"<answer>{answer}</answer>") == paid
    item["answer"] = "3.051757812e-05"
    for small, worth in (("3.051757812e-05", 1.0), ("0.00003051757812", 1.0), ("0", 0.0), ("..e-5", 0.0)):
        assert reward(Problem("", "", {"generator": "coin_flip", "item": item}), f"<answer>{small}</answer>") == worth


def test_words_that_are_names_of_no_number_are_words():
    item = {"question": "", "answer": "nan", "metadata": {"word": "nan", "sentence": "nan", "word_len": 3}}
    reward = load_task("reasoning_gym").reward
    assert reward(Problem("", "", {"generator": "spell_backward", "item": item}), "<answer>nan</answer>") == 1.0


def test_infinite_numbers_are_kept_in_the_cache(monkeypatch):
    """codeio has them in what its programs are given."""
    metadata = {
        "input": {"limit": float("inf"), "low": float("-inf"), "x": 1e300},
        "nan": [float("nan")],
        "inf": "inf",
        "n": None,
    }
    made = {"question": "nan and inf", "answer": "-inf", "metadata": metadata}
    task = load_task("reasoning_gym:chain_sum", SMALL)
    monkeypatch.setitem(
        task.reward.__globals__,
        "_make",
        lambda name, split, size, options: [{**made, "question": f"{split} {i}"} for i in range(size)],
    )
    (first, *_), _ = task.problems("train"), load_task("reasoning_gym:chain_sum", SMALL).problems("train")
    item = first.meta["item"]
    assert item["question"] == "train 0" and item["answer"] == "-inf" and math.isnan(item["metadata"].pop("nan")[0])
    assert item["metadata"] == {"input": {"limit": math.inf, "low": -math.inf, "x": 1e300}, "inf": "inf", "n": None}


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
