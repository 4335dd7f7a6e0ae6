"""Any file of questions: the fields that are understood, and the reward by exact match."""

import json
from decimal import Decimal

import pytest

from rwkv_es import task
from rwkv_es.system.errors import TaskError
from rwkv_es.task import Problem, load_task
from rwkv_es.task.datasets import fetch_rows


def problem_of(tmp_path, row):
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    return load_task("jsonl", str(tmp_path / "test.jsonl")).problems("test")[0]


USER, SYSTEM = {"role": "user", "content": "q"}, {"role": "system", "content": "s"}
SAID = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "answer", "meta"),
    [
        ({"question": "q", "answer": "a"}, "a", {"question": "q", "answer": "a"}),
        ({"prompt": "q", "answer": 3}, "3", {"answer": 3}),
        ({"problem": "q", "ground_truth": [1, 2], "x": 1}, "1", {"problem": "q", "ground_truth": [1, 2], "x": 1}),
        ({"prompt": "q", "system": "a column"}, "", {"system": "a column"}),
        ({"prompt": [SYSTEM, USER]}, "", {"prompt": [SYSTEM, USER], task.SYSTEM: "s"}),
        ({"prompt": "q", "completion": " a"}, " a", {"completion": " a"}),
        ({"prompt": [USER], "completion": [SAID]}, "a", {"prompt": [USER], "completion": [SAID]}),
        ({"messages": [USER, SAID]}, "a", {"messages": [USER, SAID]}),
        ({"messages": [SYSTEM, USER, SAID], "x": 1}, "a", {"messages": [SYSTEM, USER, SAID], "x": 1, task.SYSTEM: "s"}),
        ({"messages": [USER], "answer": 3}, "3", {"messages": [USER], "answer": 3}),
        ({"messages": [USER, SAID], "answer": "b"}, "b", {"messages": [USER, SAID], "answer": "b"}),
        (
            {"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "7"}, "data_source": "d"},
            "7",
            {"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "7"}, "data_source": "d"},
        ),
    ],
)
def test_rows_of_many_forms_are_understood(tmp_path, row, answer, meta):
    assert problem_of(tmp_path, row) == Problem("q", answer, meta)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "q"}, "line 1 has no question; it needs one of the fields prompt, question, problem, messages"),
        ({"prompt": 3}, "field 'prompt' must be a text or a list of messages; got 3"),
        ({"prompt": []}, "must be a text or a list of messages"),
        ({"prompt": [{"role": "user", "content": None}]}, "must be a text or a list of messages"),
        ({"prompt": [USER, {"role": "assistant", "content": "a"}, USER]}, "one message of the user"),
        ({"prompt": [SYSTEM]}, "one message of the user"),
        ({"messages": [USER, SAID, USER, SAID]}, "field 'messages' must be one message of the user"),
        ({"messages": [SAID]}, "one message of the user"),
        ({"prompt": None, "question": None, "answer": "4"}, "line 1 has no question"),
        *(
            ({"prompt": "q", "answer": answer}, r"line 1: field 'answer' must be a text, a number, or a list of those")
            for answer in (True, {"a": 1}, [], [None], [["a"]], ["a", {}], [False], float("nan"), [float("inf")])
        ),
    ],
)
def test_rows_that_are_not_are_refused(tmp_path, row, message):
    with pytest.raises(TaskError, match=message):
        problem_of(tmp_path, row)


def test_a_set_of_the_hub_is_named_by_its_prefix(monkeypatch):
    asked = []
    task = load_task("jsonl", "hf:some/set:main")
    monkeypatch.setitem(
        task.reward.__globals__,
        "fetch_rows",
        lambda *args: asked.append(args) or [("here", {"question": "q", "answer": "a"})],
    )
    assert task.problems("train")[0].prompt == "q" and asked == [("some/set", "main", "train")]
    assert fetch_rows is not None


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        (" blue\n", "blue", 1.0),
        ("I think:\nblue", "blue", 1.0),
        ("it is blue", "blue", 0.0),
        ("blue\nno", "blue", 0.0),
        (" <think>blue", "blue", 0.0),
        (" <think>red</think>blue", "blue", 1.0),
        ("so 1,000.0 it is", "1000", 1.0),
        ("so 999", "1000", 0.0),
        ("a\nb", "a\nb", 1.0),
        ("x 5", "x 5", 1.0),
        ("5", "x 5", 0.0),
    ],
)
def test_the_default_reward_is_an_exact_match(text, answer, reward):
    assert load_task("jsonl").reward(Problem("", answer), text) == reward


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (3, "3"), (-3.0, "-3"), (4.5, "4.5"), (1e-7, "0.0000001"), (1e22, "10000000000000000000000"), (10**400, str(10**400)),
        ("4.50", "4.50"), (["Paris", "paris"], "Paris"), ([None, 4.5, "x"], "4.5"), (["", "a"], "a"), ("", ""), (None, ""),
    ],
)  # fmt: skip
def test_answers_are_written_as_a_person_writes_them(tmp_path, answer, text):
    assert problem_of(tmp_path, {"prompt": None, "question": "q", "answer": answer}).answer == text


def test_any_of_several_right_answers_is_right_and_null_is_absent(tmp_path):
    problem = problem_of(tmp_path, {"prompt": None, "problem": "q", "answer": ["Paris", "paris", 75.0]})
    rewards = [
        load_task("jsonl").reward(problem, text)
        for text in ("Paris", "so:\nparis", "75", "x \\boxed{75} 3", "PARIS", "7")
    ]
    assert rewards == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    verl = {"prompt": [USER], "answer": None, "ground_truth": None, "reward_model": {"ground_truth": ["7", "8"]}}
    problem = problem_of(tmp_path, verl)
    assert [load_task("jsonl").reward(problem, text) for text in "789"] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("gold", [{"target": 24, "numbers": [1]}, True])
def test_a_gold_that_only_a_reward_reads_is_left_to_it(tmp_path, gold):
    problem = problem_of(tmp_path, {"prompt": "q", "reward_model": {"ground_truth": gold}})
    assert problem.answer == "" and problem.meta["reward_model"]["ground_truth"] == gold


def test_decimals_and_short_floats_of_parquet_are_what_was_written(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "prompt": ["a", "b", None],
        "question": ["x", "y", "c"],
        "answer": pyarrow.array([Decimal("4.50"), None, Decimal("-3.00")]),
        "ground_truth": pyarrow.array([None, 0.1, None], pyarrow.float32()),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "test.parquet")
    found = load_task("jsonl", str(tmp_path)).problems("test")
    assert [(problem.prompt, problem.answer) for problem in found] == [("a", "4.50"), ("b", "0.1"), ("c", "-3.00")]


def test_without_an_answer_or_data_the_message_says_what_to_do():
    with pytest.raises(ValueError, match="--reward"):
        load_task("jsonl").reward(Problem("", ""), "x")
    with pytest.raises(TaskError, match="needs --data"):
        load_task("jsonl").problems("test")
