"""Where rows come from, and what may never be trained on."""

import importlib.util
import json
import re
import sys
from types import SimpleNamespace

import pytest

from rwkv_es.system.errors import TaskError
from rwkv_es.task import datasets
from rwkv_es.task.datasets import aime_keys, fetch_rows, question_hash, read_rows
from rwkv_es.task.fingerprints import Fingerprints, fingerprint

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
    assert all(set(key) == {"id", "answer", "question_sha256_nows", "fingerprints"} for key in keys.values())
    assert all(re.fullmatch("(?:[0-9a-f]{8}){12,}", digits) for key in keys.values() for digits in key["fingerprints"])


def test_a_hash_does_not_see_white_space():
    # sha256 of "ab", from another program
    assert question_hash(" a\n\tb\u00a0") == "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603"


@pytest.mark.parametrize("name", ["question", "prompt", "problem"])
def test_a_held_out_problem_is_refused_in_training_by_its_text(tmp_path, keys, name):
    data = write(tmp_path, **{name: "Find the number of pairs (a,  b)."})
    with pytest.raises(TaskError, match=r"line 2 is aime-2024-I-99, which is held out"):
        list(read_rows(data, "train"))
    assert len(list(read_rows(write(tmp_path, "test", **{name: SECRET}), "test"))) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": SECRET}]},
        {"prompt": "q", "extra_info": {"index": 3, "question": SECRET}},
        {"prompt": "q", "conversations": [[{"from": "human", "value": SECRET}], "x"]},
        {"prompt": "q", "raw_problem": SECRET},
    ],
)
def test_a_held_out_problem_is_refused_wherever_in_a_row_it_stands(tmp_path, keys, row):
    with pytest.raises(TaskError, match=r"line 2 is aime-2024-I-99, which is held out"):
        list(read_rows(write(tmp_path, **row), "train"))


@pytest.mark.parametrize(
    "row",
    [
        {"source": "AIME", "year": 2024},
        {"source": "aime", "year": "2025"},
        {"competition": "American Invitational Mathematics Examination I", "Year": 2024.0},
        {"metadata": {"contest": "AIME II"}, "info": {"exam_year": 2024}},
        {"source": "AIME", "date": "2024-02-01"},
        {"aime_year": 2025},
        {"data_source": "aime24"},
        {"source": "math-ai/aime25"},
        {"source": "AIME-24"},
        {"tags": ["hard", "AIME '24"]},
        {"ID": "2024-II-4"},
        {
            "url": "https://artofproblemsolving.com/wiki/index.php/2024_AIME_I_Problems/Problem_15?srsltid=AfmBOoqP9aelPNCpuFLO2bLyo"
        },
    ],
)
def test_years_and_short_names_are_labels_too(tmp_path, row):
    with pytest.raises(TaskError, match="AIME 2024 and 2025, held out"):
        list(read_rows(write(tmp_path, question="q", **row), "train"))


@pytest.mark.parametrize(
    "row",
    [
        {"source": "AIME", "year": 2023},
        {"source": "AMC", "year": 2024},
        {"source": "AIME", "id": 2024},
        {"id": "aime_24", "source": "AIME", "year": 1999},
        {"source": "AIME_1983_2024", "Year": 2011},
        {"note": "we aimed at 2024 points, and claimed 25"},
        {"source": "AIME 240 drills"},
        {"answer": "2024", "source": "aime"},
        {"year": True, "source": "AIME"},
    ],
)
def test_what_only_looks_alike_is_no_harm(tmp_path, row):
    assert len(list(read_rows(write(tmp_path, question="q", **row), "train"))) == 2


FENCE = (
    r"A farmer has $12$ red and $\frac{1}{2}\cdot 14$ blue posts. Find the number of ways to build a fence of $n\leq 19$ posts "
    r"along the river so that no two blue posts stand side by side, and let $P$ be that number."
)


@pytest.mark.parametrize(
    ("text", "is_told"),
    [
        (FENCE, True),
        (FENCE.replace("$", "").replace(r"\leq", "<="), True),
        (
            FENCE.replace(r"\frac{1}{2}", r"\tfrac12").replace("$12$", r"\(1{,}2\)")
            + "[asy] draw((1,2)--(3,4)); [/asy]",
            True,
        ),
        ("Solve this problem, please, and put the answer in a box.\n\n" + FENCE + "\n\nThink step by step." * 20, True),
        (FENCE.upper(), True),
        (FENCE.replace("12", "30").replace("farmer", "baker"), True),
        ("Find the number of ways to build a fence of posts, and let P be that number.", False),
        ("A farmer has red and blue hens. How many posts does he need? " * 3, False),
        (FENCE[:60], False),
        ("", False),
        (FENCE[::-1], False),
    ],
)
def test_a_text_is_told_in_other_spellings_and_inside_of_others(text, is_told):
    digits = "".join(f"{hash_:08x}" for hash_ in fingerprint(FENCE).tolist())
    other = "".join(f"{hash_:08x}" for hash_ in fingerprint(FENCE[::-1].replace("h", "the number of ways ")).tolist())
    known = Fingerprints({"other": [other], "fence": [other[:-64], digits]})
    assert known.find(text) == ("fence" if is_told else None)
    assert Fingerprints({}).find(text) is None


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


@pytest.mark.parametrize(
    "place", ["train-0000{}-of-00002.jsonl", "data/train-0000{}-of-00002.jsonl", "train/000{}.jsonl"]
)
def test_shards_are_read_in_the_order_of_their_names(tmp_path, place):
    for number in (1, 0):
        file = tmp_path / place.format(number)
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps({"question": f"{number} {row}"}) + "\n" for row in range(2)))
    (tmp_path / "test-00000-of-00001.jsonl").write_text('{"question": "held out"}\n')
    assert [row["question"] for _, row in read_rows(str(tmp_path), "train")] == ["0 0", "0 1", "1 0", "1 1"]
    assert [row["question"] for _, row in read_rows(str(tmp_path), "test")] == ["held out"]


def test_parquet_shards_too_and_one_whole_file_goes_first(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for number in range(2):
        table = pyarrow.table({"question": [f"{number}"], "answer": [[1, 2]]})
        parquet.write_table(table, tmp_path / f"test-0000{number}-of-00002.parquet")
    assert [row for _, row in read_rows(str(tmp_path), "test")] == [
        {"question": "0", "answer": [1, 2]},
        {"question": "1", "answer": [1, 2]},
    ]
    (tmp_path / "test.jsonl").write_text('{"question": "whole"}\n')
    assert [row["question"] for _, row in read_rows(str(tmp_path), "test")] == ["whole"]
