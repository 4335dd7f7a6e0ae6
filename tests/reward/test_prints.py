"""What rewards print is shown, with a name before it, and never without end."""

import time

import pytest

from rwkv_es.reward import prints
from rwkv_es.reward.pool import RewardPool
from rwkv_es.reward.prints import Prints
from rwkv_es.task import Problem

CODE = """
import os, sys
print("imported")

def score(completion, answer):
    print("scoring", completion)
    print("to stderr", file=sys.stderr, flush=True)
    os.write(1, b"from C\\n")
    return float(completion == answer)

def chatty(completion, answer):
    for number in range(5000):
        print("line", number, "x" * 100)
    return 1.0

def dies(completion, answer):
    print("last words", flush=True)
    os._exit(3)
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "own.py").write_text(CODE)
    return tmp_path / "own.py"


def shown(capsys, until, deadline_s=10.0):
    """Return what stderr has shown, once a text is in it: pipes are read by threads."""
    said, deadline = "", time.monotonic() + deadline_s
    while until not in said and time.monotonic() < deadline:
        said += capsys.readouterr().err
        time.sleep(0.02)
    return said


def score(code, function, texts, **options):
    with RewardPool("jsonl", str(code.with_name("p.jsonl")), 1, 20.0, 1.0, reward=f"{code}:{function}") as pool:
        return pool.score([Problem("q", "1")] * len(texts), texts)


@pytest.fixture(autouse=True)
def problems(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"question": "q", "answer": "1"}\n')


def test_prints_of_a_worker_are_shown_with_a_name(code, capsys):
    assert score(code, "score", ["1"]).rewards == [1.0]
    lines = shown(capsys, "scoring 1").splitlines()
    assert {"reward: imported", "reward: scoring 1", "reward: to stderr", "reward: from C"} <= set(lines)


def test_the_last_words_of_a_reward_that_ends_its_process_are_shown(code, capsys):
    assert score(code, "dies", ["1"]).errors == 1
    assert "reward: last words" in shown(capsys, "last words")


def test_a_reward_that_prints_without_end_is_not_slowed_and_shows_a_few_lines(code, capsys):
    assert score(code, "chatty", ["1"] * 3).rewards == [1.0] * 3
    said = shown(capsys, "line 18")
    assert said.count("reward: line") <= prints.LINES


def test_lines_that_are_left_out_are_counted_and_long_ones_cut(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(prints.time, "monotonic", lambda: now[0])
    tail = Prints()
    for number in range(prints.LINES + 7):
        tail.show([str(number).encode()])
    now[0] += prints.PERIOD_S
    tail.show([b"later \xff" + b"x" * 1000])
    lines = capsys.readouterr().err.splitlines()
    assert lines[prints.LINES - 1 :] == [
        f"reward: {prints.LINES - 1}",
        "reward: ... 7 more lines",
        rf"reward: later \xff{'x' * 293}",
    ]


@pytest.mark.parametrize("rank, is_shown", [("0", True), ("1", False)])
def test_of_processes_that_train_together_the_first_one_shows_them(code, capsys, monkeypatch, rank, is_shown):
    monkeypatch.setenv("RANK", rank)
    assert score(code, "score", ["1"]).rewards == [1.0]
    assert ("reward: scoring 1" in shown(capsys, "scoring 1", 10.0 if is_shown else 0.3)) == is_shown


def test_what_rewards_print_commands_no_terminal(capsys):
    Prints().show([b"\x1b[2J\x1b]0;title\x07", "\x9b31m\tä\r".encode(), b"\xff\x00"])
    said = capsys.readouterr().err
    assert said == "reward: \ufffd[2J\ufffd]0;title\ufffd\nreward: \ufffd31m\tä\nreward: \\xff\ufffd\n"
