"""Any file of questions: the fields that are understood, and the reward by exact match."""

import importlib.util
import json
import sys
from decimal import Decimal
from types import ModuleType, SimpleNamespace

import pytest

from rwkv_es import task
from rwkv_es.system.errors import TaskError
from rwkv_es.task import Problem, load_task


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


def hub_of(monkeypatch, **splits):
    """Let the library that fetches sets of the hub find one of these splits; return what it was asked for."""
    asked = []

    def load_dataset(*names):
        asked.append(names)
        return {name: [{"question": q, "answer": "a"} for q in questions] for name, questions in splits.items()}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def questions(data, split):
    return [problem.prompt for problem in load_task("jsonl", str(data)).problems(split)]


MANY = [f"question {i}" for i in range(200)]


def test_a_set_of_the_hub_is_named_by_its_prefix(monkeypatch):
    asked = hub_of(monkeypatch, train=["q"], test=["r"])
    assert questions("hf:some/set:main", "train") == ["q"] and asked == [("some/set", "main")]
    assert questions("hf:some/set", "test") == ["r"] and asked[1:] == [("some/set",)]


def test_validation_stands_for_a_test_split_that_a_set_lacks(monkeypatch):
    hub_of(monkeypatch, train=["q"], validation=["r"])
    assert questions("hf:some/set", "train") == ["q"] and questions("hf:some/set", "test") == ["r"]


@pytest.mark.parametrize("name", ["train", "all"])
def test_a_set_of_the_hub_with_one_split_is_divided(monkeypatch, name):
    hub_of(monkeypatch, **{name: MANY})
    train, test = questions("hf:some/set", "train"), questions("hf:some/set", "test")
    assert sorted(train + test) == sorted(MANY) and 8 <= len(test) <= 32


def test_a_set_with_a_test_split_alone_is_asked_whole_and_never_trained_on(monkeypatch):
    hub_of(monkeypatch, test=MANY)
    assert questions("hf:some/set", "test") == MANY
    with pytest.raises(TaskError, match="some/set has no split train, only test"):
        questions("hf:some/set", "train")


def test_a_name_that_is_missing_and_a_folder_called_datasets_are_said(tmp_path, monkeypatch):
    with pytest.raises(TaskError, match="hf: needs the name of a data set"):
        questions("hf:", "train")
    monkeypatch.setitem(sys.modules, "datasets", ModuleType("datasets"))  # as a folder of data here makes it
    with pytest.raises(TaskError, match=r"some/set needs its data: .*rwkv-es.tasks"):
        questions("hf:some/set", "train")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the extra tasks")
def test_the_library_of_the_hub_reads_what_it_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    rows = [json.dumps({"messages": [USER | {"content": q}, SAID]}) for q in MANY]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(rows))
    train, test = (load_task("jsonl", f"hf:{tmp_path}/set").problems(split) for split in ("train", "test"))
    assert sorted(p.prompt for p in (*train, *test)) == sorted(MANY) and len(test) < 40
    assert {p.answer for p in train} == {"a"}


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


def csv_of(folder, name="a.csv", mark=","):
    lines = [f"id{mark}question{mark}answer", *(f'{i}{mark}"What is{mark} {q}?"{mark}{i}' for i, q in enumerate(MANY))]
    (folder / name).write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    return folder / name


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.TSV", "\t")])
def test_a_table_of_texts_is_read(tmp_path, name, mark):
    file = csv_of(tmp_path, name, mark)
    found = {p.prompt: p for split in ("train", "test") for p in load_task("jsonl", str(file)).problems(split)}
    assert len(found) == 200
    first = found[f"What is{mark} question 7?"]
    assert first.answer == "7" and first.meta["id"] == "7" and load_task("jsonl").reward(first, "so 7.0") == 1


def test_cells_may_hold_line_breaks_and_be_empty(tmp_path):
    (tmp_path / "test.csv").write_text('prompt,question,answer\n,"a\nb",\n"c ""d""",,2\n')
    found = load_task("jsonl", str(tmp_path)).problems("test")
    assert [(p.prompt, p.answer) for p in found] == [("a\nb", ""), ('c "d"', "2")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "question,answer\n1,2,3\n", "line 2 has more cells than the first line has names"),
        ("a.csv", "question,answer\n", "holds no problems; its first line names the columns"),
        ("a.csv", 'question,answer\n"a,b\n', "cannot be read"),
        ("a.json", "[]", "holds no problems"),
        ("a.json", "[1]", "entry 1 must be a JSON object; got int"),
        ("a.json", '[{"question": "q"}', "is not JSON"),
        ("a.json", "[" * 100_000, "is not JSON"),
    ],
)
def test_tables_and_arrays_that_are_none_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(TaskError, match=message):
        load_task("jsonl", str(tmp_path / name)).problems("train")


@pytest.mark.parametrize("make", [json.dumps, lambda rows: "\n".join(map(json.dumps, rows))])
def test_json_may_be_an_array_or_lines(tmp_path, make):
    (tmp_path / "a.json").write_text(make([{"question": "q", "answer": ["x", "y"]}]))
    (problem,) = load_task("jsonl", str(tmp_path / "a.json")).problems("train")
    assert problem.answer == "x" and load_task("jsonl").reward(problem, "y") == 1


@pytest.mark.parametrize("place", ["part-{}.parquet", "data/0000{}.parquet", "train-0000{}-of-00003.parquet"])
def test_a_folder_of_parquet_shards_with_messages_and_lists_is_divided(tmp_path, place):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for number in range(3):
        rows = [
            {"messages": [SYSTEM, USER | {"content": q}, SAID], "answer": ["a", str(i)]}
            for i, q in enumerate(MANY[number::3])
        ]
        file = tmp_path / place.format(number)
        file.parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    train, test = (load_task("jsonl", str(tmp_path)).problems(split) for split in ("train", "test"))
    assert sorted(p.prompt for p in (*train, *test)) == sorted(MANY) and 8 <= len(test) <= 32
    assert {p.meta[task.SYSTEM] for p in train} == {"s"}
    assert {load_task("jsonl").reward(p, text) for p in test for text in ("a", p.meta["answer"][1])} == {1.0}
