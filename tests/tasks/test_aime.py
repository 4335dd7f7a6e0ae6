"""AIME: texts are recognised by their hash, and never trained on."""

import json

import pytest

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Problem, datasets, load_task

KEPT = "Find $x$ with $x + 1 = 26$."


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    key = {datasets.question_hash(KEPT): {"id": "aime-2025-II-16", "answer": "025"}}
    monkeypatch.setattr(datasets, "aime_keys", lambda: key)


def problems(tmp_path, split, **row):
    (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    return load_task("aime", str(tmp_path)).problems(split)


def test_a_text_is_matched_with_its_key_whatever_its_white_space(tmp_path):
    (problem,) = problems(tmp_path, "test", question="Find  $x$ with\n$x + 1 = 26$.", answer=25)
    assert problem.meta == {"id": "aime-2025-II-16", "ground_truth": "025"}
    assert load_task("aime").reward(problem, problem.answer) == 1.0


@pytest.mark.parametrize(
    ("split", "row", "message"),
    [
        ("test", {"question": "Find $y$."}, "line 1: the question is none of AIME 2024 and 2025"),
        ("test", {"question": KEPT, "answer": "26"}, "the answer '26' is not the key's for aime-2025-II-16"),
        ("train", {"question": KEPT, "answer": "25", "year": 1999}, "is aime-2025-II-16, which is held out"),
        ("train", {"question": "q", "answer": "25", "year": 2024}, "year 2024 is held out"),
        ("train", {"question": "q", "answer": "25", "year": "2025"}, "year 2025 is held out"),
        ("train", {"question": "q", "answer": "25", "id": "2024-II-3"}, "says that it is of AIME"),
        ("train", {"question": "q", "answer": "25", "id": "problem 3 of 2024"}, "year 2024 is held out"),
        (
            "train",
            {"question": "q", "answer": "25", "url": "wiki/2025_AIME_I"},
            "says that it is of AIME 2024 and 2025, held out",
        ),
        ("train", {"question": "q", "answer": "1000"}, "a whole number from 0 to 999; got '1000'"),
        ("train", {"question": "q"}, "a whole number from 0 to 999; got None"),
    ],
)
def test_a_text_in_the_wrong_place_is_refused(tmp_path, split, row, message):
    with pytest.raises(TaskError, match=message):
        problems(tmp_path, split, **row)


def test_earlier_years_may_be_trained_on(tmp_path):
    (problem,) = problems(tmp_path, "train", question="q", answer="007", year=2019, id="2019-I-12024")
    assert problem.answer == r"\boxed{7}"


def test_without_texts_the_message_says_what_to_bring():
    with pytest.raises(TaskError, match="give --data with a folder"):
        load_task("aime").problems("test")


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (r"\boxed{25}", 1.0),
        (r"\boxed{025}", 1.0),
        (r"\boxed{$25.0$}", 1.0),
        (r"\boxed{1} \boxed{25}", 1.0),
        ("So 25.", 1.0),
        (r"\boxed{\text{25}}", 1.0),
        (r"\boxed{\mathbf{25}}.", 1.0),
        (r"\boxed{25^\circ}", 1.0),
        (r"\boxed{25.} Check: 5*5", 1.0),
        (r"\boxed{m+n=25}", 1.0),
        (r"\boxed{25\text{ cm}^2}", 1.0),
        (r"\boxed{5^2}", 0.0),
        (r"\boxed{20+5}", 0.0),
        (r"\boxed{25x}", 0.0),
        (r"\boxed{\frac{25}{2}}", 0.0),
        (r" <think>\boxed{1}</think>25", 1.0),
        (r"\boxed{26} 25", 0.0),
        (r"\boxed{25, 26}", 0.0),
        (r"\boxed{-25}", 0.0),
        (r"\boxed{1025}", 0.0),
        (r"\boxed{}25", 0.0),
        (r" <think>\boxed{25}", 0.0),
        ("25.5", 0.0),
        ("-25", 0.0),
        ("9" * 5000, 0.0),
    ],
)
def test_the_last_box_or_else_the_last_number_counts(text, reward):
    assert load_task("aime").reward(Problem("", "", {"ground_truth": "025"}), text) == reward
