import json
import sys
from types import SimpleNamespace

import pytest
from places import DATA
from timing import cpu_seconds

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Problem, load_task

GSM8K = load_task("gsm8k")


def score(text: str, gold: str) -> float:
    return GSM8K.reward(Problem("", gold), text)


def test_every_case_of_the_shared_file_scores_as_it_says():
    file = DATA / "gsm8k_cases.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not there; set RWKV_ES_DATA to the folder that holds it")
    cases = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
    wrong = [c["id"] for c in cases if score(c["text"], c["gold"]) != c["expected"]]
    assert len(cases) > 30 and wrong == []


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("#### 18", "18"),
        ("#### 18", "#### 18"),
        ("####-3", "-3"),
        ("#### −3", "-3"),
        ("#### - $3", "-3"),
        ("#### -$1,234.50", "-1234.5"),
        ("#### $1,000", "1,000"),
        ("#### **18**", "18"),
        ("#### 3\n#### 18", "18"),
        ("#### 18\n####", "18"),
        ("#### 18. That is 5 more.", "18"),
        ("It is 20-2, so 18.", "18"),
        ("20-18", "18"),
        ("x = -18", "-18"),
        ("a loss of -$18", "-18"),
        ("so ...18", "18"),
        ("$.50", "0.5"),
        ("018", "18"),
        (" <think>#### 7</think>\nIt is 18", "18"),
        (" <think>\n</think>18", "18"),
        (" <think>a</think>#### 7</think> 18", "18"),
        ("18\n\nUser: 7", "18"),
        (r"\boxed{18}. Check: 9+9", "18"),
        (r"\boxed{18} is 2 more than #### 16, no: \boxed{18}", "18"),
        (r"\boxed{7} no #### 18", "18"),
        (r"\boxed{\$18} in 3 days", "18"),
        (r"\boxed{18\text{ dollars}} for 2", "18"),
        (r"\boxed{\text{Janet makes } 18 \text{ dollars in all, she says}}, 9 a day", "18"),
        (r"\boxed{1{,}800} / 2", "1800"),
        (r"\boxed{-18}, not 18 - 36", "-18"),
        (r"\boxed{\frac{9}{2}} = 4 1/2", "4.5"),
        (r"\boxed{x}: 18", "18"),
        ("18\n\nUser: <think>7", "18"),
    ],
)
def test_the_number_is_found(text, gold):
    assert score(text, gold) == 1.0


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("", "18"),
        ("#### 18", "-18"),
        ("#### -18", "18"),
        ("#### 18.01", "18"),
        ("#### 18\n#### 7", "18"),
        ("20-18", "-18"),
        (r"\boxed{7} 18", "18"),
        (r"\boxed{18} \boxed{7}", "18"),
        (r"\boxed{18} #### 7", "18"),
        (r"\boxed{\frac{1}{18}}", "18"),
        (" <think>#### 18", "18"),
        (" <think>#### 18</think>", "18"),
        (" <think 18", "18"),
        ("１８", "18"),
        ("٣", "3"),
        ("eighteen", "18"),
        ("1e1", "10"),
        ("18." + "0" * 60, "18"),  # a number of over 50 characters
        ("7\n\nQuestion: b\n#### 18", "18"),
        ("7\n\nUser: b\n#### 18", "18"),
    ],
)
def test_other_texts_are_not_paid(text, gold):
    assert score(text, gold) == 0.0


@pytest.mark.parametrize(
    "piece",
    [
        "(",
        "9",
        ".",
        ",",
        "1,",
        "1.",
        ".1",
        "-",
        "$",
        "####",
        "#",
        "#### ",
        "####$",
        "#### -",
        " ",
        "</think>",
        "<think",
        "\0",
        "\ud800",
    ],
)
def test_a_hundred_thousand_characters_score_zero_at_once(piece):
    for start in ("", "#### "):
        text = start + piece * (100_000 // len(piece))
        assert score(text, "18") == 0.0
        assert cpu_seconds(lambda text=text: score(text, "18")) < 0.05


def test_a_row_may_hold_the_number_or_the_solution_as_on_the_hub(tmp_path):
    rows = [{"question": "q", "answer": "1000"}, {"question": "q", "answer": "500*2 = <<500*2=1000>>1000\n#### 1,000"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [*load_task("gsm8k", str(tmp_path)).problems("train")] == [
        Problem("q", "#### 1000", {"ground_truth": "1000"})
    ] * 2
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "q", "answer": "many"}))
    with pytest.raises(TaskError, match=r"test\.jsonl, line 1: no number in the answer 'many'"):
        load_task("gsm8k", str(tmp_path)).problems("test")


def test_without_data_the_set_is_fetched_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"question": "q", "answer": "so\n#### 5"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_task("gsm8k").problems("test") == [Problem("q", "#### 5", {"ground_truth": "5"})]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


def test_without_data_and_without_the_extra_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r"pass --data .*pip install rwkv-es\[tasks\]"):
        load_task("gsm8k").problems("test")


def test_an_unreachable_hub_is_said(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(TaskError, match=r"openai/gsm8k cannot be fetched \(no route to host\); pass --data"):
        load_task("gsm8k").problems("test")


def test_every_gold_solution_of_the_set_is_paid():
    folder = DATA / "gsm8k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set RWKV_ES_DATA to the folder that holds it")
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text("utf-8").split("\n") if line]
    assert len(rows) == 1319
    assert all(score(f" <think>7</think>{row['solution']}", row["answer"]) == 1.0 for row in rows)
    train = load_task("gsm8k", str(folder)).problems("train")
    assert len(train) == 7473
    assert all(GSM8K.reward(problem, problem.answer) == 1.0 for problem in train)
