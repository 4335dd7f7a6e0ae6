"""Data without splits are divided by a hash: what is on which side, whatever else the file holds."""

import json
import random

import pytest

from rwkv_es.cli import main
from rwkv_es.task import Problem, load_task
from rwkv_es.task.division import Side, divided, hashed, question_of, side_of
from rwkv_es.task.mixture import load_tasks, overlap
from rwkv_es.task.splits import problems_to_ask, say_division

ROWS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i), "id": i} for i in range(1000)]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def sides(data, task="jsonl"):
    loaded = load_task(task, data)
    return [[problem.prompt for problem in loaded.problems(split)] for split in ("train", "test")]


def test_a_tenth_is_held_out_whatever_the_order_and_what_is_appended(tmp_path):
    train, test = sides(write(tmp_path / "a.jsonl", ROWS))
    assert sorted(train + test) == sorted(row["question"] for row in ROWS)
    assert 70 <= len(test) <= 130, "10 %, within three standard deviations"
    assert [test[0], train[0]] == [min(side, key=lambda q: int(q.split()[2])) for side in (test, train)], "in order"
    mixed = random.Random(0).sample(ROWS, len(ROWS))
    more = [{"question": f"more {i}", "answer": ""} for i in range(300)]
    again = sides(write(tmp_path / "b.jsonl", [*mixed, *more]))
    assert {q for q in again[1] if not q.startswith("more")} == set(test) and len(again[1]) > len(test)


def test_the_sides_never_change_from_release_to_release(tmp_path):
    held_out = [row["id"] for row in ROWS[:60] if row["question"] in sides(write(tmp_path / "a.jsonl", ROWS))[1]]
    assert held_out == HELD_OUT


HELD_OUT = [3, 48, 52]


def test_duplicates_of_a_question_are_on_one_side_whatever_else_their_rows_hold(tmp_path):
    twins = [{"problem": row["question"].replace(" ", "  "), "answer": "x", "source": "b"} for row in ROWS]
    train, test = (
        {" ".join(question.split()) for question in side}
        for side in sides(write(tmp_path / "a.jsonl", [*ROWS, *twins]))
    )
    assert not train & test and len(train) + len(test) == len(ROWS)


def place_of(problem):
    return hashed(f"question {question_of(problem)}")


@pytest.mark.parametrize("count", range(4, 40))
def test_no_side_is_ever_empty(count):
    problems = [Problem(f"{count}, {i}", "") for i in range(count)]
    train, test = (side_of(problems, split, "a.jsonl") for split in ("train", "test"))
    assert len(train) and len(test) and [*train, *test] != [] and len(train) + len(test) == count
    assert max(map(place_of, test)) < min(map(place_of, train))
    natural = [problem for problem in problems if place_of(problem) < 0.1]
    assert list(test) == natural or (len(test) == 1 and not natural) or (len(train) == 1 and len(natural) == count)


def test_problems_that_all_hash_alike_do_not_leave_a_side_empty():
    low = sorted((Problem(str(i), "") for i in range(5000)), key=place_of)[:20]
    assert place_of(low[-1]) < 0.1
    assert list(side_of(low, "train", "a")) == [low[-1]] and list(side_of(low, "test", "a")) == low[:-1]


def test_a_file_too_small_to_say_much_says_so_in_its_line(tmp_path):
    few, many = (load_task("jsonl", write(tmp_path / f"{n}.jsonl", ROWS[:n])).problems("test") for n in (5, 1000))
    assert (
        "5.jsonl has no splits: 4 problems are for training, 1 held out, by a hash of the question; so few" in few.words
    )
    assert many.words.endswith("held out, by a hash of the question") and "\n" not in few.words + many.words


@pytest.mark.parametrize(("count", "words"), [(1, "one problem, which is"), (2, "2 problems, "), (3, "3 problems, ")])
def test_what_is_too_few_to_be_divided_is_on_both_sides(tmp_path, count, words):
    loaded = load_task("jsonl", write(tmp_path / "a.jsonl", 2 * ROWS[:count]))
    assert loaded.problems("train")[:] == loaded.problems("test")[:] and len(loaded.problems("train")) == 2 * count
    found = loaded.problems("test").words
    assert found.startswith(f"{tmp_path}/a.jsonl holds {words}") and found.endswith("trained on and held out alike")


def test_splits_of_a_folders_own_are_left_alone(tmp_path):
    write(tmp_path / "train.jsonl", ROWS[:20])
    write(tmp_path / "validation.jsonl", ROWS[20:40])
    loaded = load_task("jsonl", str(tmp_path))
    assert [len(loaded.problems(split)) for split in ("train", "test")] == [20, 20]
    assert not isinstance(loaded.problems("test"), Side)
    write(tmp_path / "test.jsonl", ROWS[40:50])
    assert len(load_task("jsonl", str(tmp_path)).problems("test")) == 10


@pytest.mark.parametrize("name", ["test.jsonl", "validation-00000-of-00001.jsonl"])
def test_a_file_that_is_called_a_test_is_one(tmp_path, name, capsys):
    data = write(tmp_path / name, ROWS[:50])
    assert [len(side) for side in sides(data)] == [50, 50]
    options = ["--task=jsonl", "--template=raw", "--model=tiny", "--population=2", "--prompts=1", "--steps=0"]
    write(tmp_path / name, [{"question": ":1+1=", "answer": "2"}, {"question": ":1+2=", "answer": "3"}])
    assert main(["train", f"--data={data}", *options, "--max-new-tokens=1", f"--run={tmp_path}/run"]) == 0
    assert "2 of the 2 held-out problems are also training problems" in capsys.readouterr().err


def test_rows_of_environments_are_divided_alike(tmp_path):
    rows = [{"prompt": f"{i}", "n": i} for i in range(200)]
    train, test = divided(rows, lambda row: row["prompt"])
    again = divided([*rows[::-1], *rows[:50]], lambda row: row["prompt"])
    assert {row["n"] for row in again[1]} == {row["n"] for row in test} and 8 <= len(test) <= 32
    assert sorted([*train, *test], key=rows.index) == rows


def test_other_tasks_and_parts_of_mixtures_are_divided_too(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", ROWS)
    assert sides(file, "gsm8k") == sides(file)
    mixed = load_tasks("gsm8k=1,countdown:4=1", f"gsm8k={file}")
    assert overlap(mixed.problems("train"), mixed.problems("test")) == 0
    say_division(mixed.problems("test"))
    assert capsys.readouterr().err.count("has no splits") == 1


def test_all_problems_may_be_asked(tmp_path):
    data = write(tmp_path / "a.jsonl", ROWS)
    assert [p.prompt for p in problems_to_ask(load_task("jsonl", data), "all")] == [row["question"] for row in ROWS]
    write(tmp_path / "train.jsonl", ROWS[:2])
    write(tmp_path / "test.jsonl", ROWS[2:3])
    asked = problems_to_ask(load_task("jsonl", str(tmp_path)), "all")
    assert [p.meta["id"] for p in asked] == [0, 1, 2]


def test_eval_says_which_problems_it_asks(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", [{"question": f":{i}+1=", "answer": str(i + 1)} for i in range(30)])
    options = [f"--data={data}", "--task=jsonl", "--template=raw", "--max-new-tokens=1", "--threads=1"]
    asked = {}
    for split in ("train", "test", "all"):
        assert main(["eval", "tiny", *options, "--reward-workers=0", "--eval-size=0", f"--split={split}"]) == 0
        out, err = capsys.readouterr()
        asked[split] = json.loads(out.splitlines()[-1])["problems"]
        assert ("a.jsonl has no splits" in err and "--split all asks all" in err) == (split != "all")
    assert asked["all"] == 30 == asked["train"] + asked["test"] and asked["test"] > 0
