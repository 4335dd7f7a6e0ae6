"""Where rows come from, and what may never be trained on."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest

from rwkv_es.errors import TaskError
from rwkv_es.task import datasets
from rwkv_es.task.datasets import aime_keys, fetch_rows, question_hash, read_rows

SECRET = "Find the number of  pairs\n(a, b)."


@pytest.fixture
def keys(monkeypatch):
    keys = {question_hash(SECRET): {"id": "aime-2024-I-99", "answer": "1"}}
    monkeypatch.setattr(datasets, "aime_keys", lambda: keys)


def write(folder, split="train", **row):
    file = folder / f"{split}.jsonl"
    file.write_text(json.dumps({"question": "What is 1 + 1?", "answer": "2"}) + "\n" + json.dumps(row) + "\n")
    return str(folder)


def test_the_keys_are_those_of_sixty_problems_without_any_text():
    keys = aime_keys()
    assert len(keys) == 60
    assert {key["id"][:9] for key in keys.values()} == {"aime-2024", "aime-2025"}
    assert all(0 <= int(key["answer"]) <= 999 and len(hash_) == 64 for hash_, key in keys.items())
    assert all(set(key) == {"id", "answer", "question_sha256_nows"} for key in keys.values())


def test_a_hash_does_not_see_white_space():
    # sha256 of "ab", from another program
    assert question_hash(" a\n\tb\u00a0") == "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603"


@pytest.mark.parametrize("name", ["question", "prompt", "problem"])
def test_a_held_out_problem_is_refused_in_training_by_its_text(tmp_path, keys, name):
    data = write(tmp_path, **{name: "Find the number of pairs (a,  b)."})
    with pytest.raises(TaskError, match=r"line 2 is aime-2024-I-99, which is held out"):
        list(read_rows(data, "train"))
    assert len(list(read_rows(write(tmp_path, "test", **{name: SECRET}), "test"))) == 2


@pytest.mark.parametrize("label", ["AIME 2024", "aime25/AIME_2025_II", "MAA AIME I (2024)", "HF/aime-2024"])
def test_a_held_out_problem_is_refused_in_training_by_what_its_row_says(tmp_path, label):
    with pytest.raises(TaskError, match="AIME 2024 and 2025, held out"):
        list(read_rows(write(tmp_path, question="q", source=label), "train"))


@pytest.mark.parametrize("label", ["AIME 2023", "2024", "AMC 2024, not AIME", "aime"])
def test_other_labels_are_no_harm(tmp_path, label):
    assert len(list(read_rows(write(tmp_path, question="q", source=label), "train"))) == 2


def test_a_set_of_the_hub_is_fetched_and_looked_through(monkeypatch, keys):
    asked = []

    def load_dataset(*args, split):
        asked.append((*args, split))
        return [{"question": "a"}, {"question": SECRET}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [where for where, _ in fetch_rows("some/set", "main", "test")] == [
        "some/set, test row 1",
        "some/set, test row 2",
    ]
    with pytest.raises(TaskError, match="some/set, train row 2 is aime-2024-I-99"):
        list(fetch_rows("some/set", "", "train"))
    assert asked == [("some/set", "main", "test"), ("some/set", "train")]


def test_a_parquet_file_is_read(tmp_path):
    if importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed; see the extra tasks in pyproject.toml")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"question": ["a", "b"], "n": [1, 2]}), tmp_path / "train.parquet")
    assert [row for _, row in read_rows(str(tmp_path), "train")] == [
        {"question": "a", "n": 1},
        {"question": "b", "n": 2},
    ]
    (tmp_path / "test.parquet").write_bytes(b"no parquet")
    with pytest.raises(TaskError, match=r"test\.parquet cannot be read"):
        list(read_rows(str(tmp_path), "test"))


def test_a_parquet_file_without_the_extra_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TaskError, match=r"pip install rwkv-es\[tasks\]"):
        list(read_rows(str(tmp_path), "train"))
