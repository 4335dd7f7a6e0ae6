"""`rwkv-es reward check`: the calls of each form, what answers earn, and failures that name the user's lines."""

import sys

import pytest

from rwkv_es.cli import main

ROWS = """{"question": "2+3=", "answer": "5", "level": 1}
{"question": "4+4=", "answer": "8", "level": 2}
"""
REWARDS = """
def plain(completion, answer):
    return float(completion == answer)

def trl(completions, answer, level, **kwargs):
    return [float(c == a) for c, a in zip(completions, answer)]

def compute_score(solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "chars": len(solution_str)}

def bad(completion, answer):
    return int(completion) / 0
"""


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    (tmp_path / "puzzles.jsonl").write_text(ROWS)
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])


def check(function, *more):
    return main(["reward", "check", f"rewards.py:{function}", "--data", "puzzles.jsonl", *more])


@pytest.mark.parametrize(
    "function, form, call",
    [
        ("plain", "plain", "plain('5', '5')"),
        ("trl", "trl", "trl(answer=['5'], question=['2+3='], level=[1], prompts=['2+3='], completions=['5']"),
        (
            "compute_score",
            "verl",
            "compute_score(solution_str='5', ground_truth='5', extra_info={'answer': '5', 'level': 1,",
        ),
    ],
)
def test_the_calls_of_each_form_are_shown_with_what_answers_earn(function, form, call, capsys):
    assert check(function) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"called as {form}, inferred from its parameters" in lines[0]
    assert lines[2:4] == ["  problem 1: '2+3='", "  the reference answer:"]
    assert lines[4].startswith(f"  {call}") and lines[5].startswith("    '5' -> 1")
    assert sum("'8' -> 0" in line or "'5' -> 0" in line for line in lines) == 2, "another problem's answer"
    assert ("logs {'chars': 1.0}" in lines[5]) == (form == "verl")


def test_a_failure_names_the_line_of_the_users_file(capsys, tmp_path):
    assert check("bad") == 0
    out = capsys.readouterr().out
    assert f'File "{tmp_path}/rewards.py", line 12, in bad' in out and "return int(completion) / 0" in out
    assert "ZeroDivisionError: division by zero" in out


def test_a_model_answers_too_if_one_is_named(capsys):
    assert check("plain", "--model", "tiny", "--template", "raw", "--max-new-tokens", "4") == 0
    out = capsys.readouterr().out
    assert out.count("the model's answers:") == 2 and "with --model" not in out


@pytest.mark.parametrize("argv", [["reward"], ["reward", "check"], ["reward", "check", "nothing.py:f"]])
def test_what_is_missing_is_one_sentence(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("raised", ["SystemExit('gone')", "GeneratorExit", "ValueError('a\\x1b[2J')"])
def test_what_a_reward_raises_is_shown_whatever_it_is(raised, capsys, tmp_path):
    (tmp_path / "rewards.py").write_text(f"def score(completion, answer):\n    raise {raised}\n")
    assert check("score") == 0
    said = capsys.readouterr().out
    assert "rewards.py" in said and "problem 3" not in said and said.count("problem 2") == 1 and "\x1b" not in said


def test_a_file_that_ends_the_program_when_it_is_imported_is_named(capsys, tmp_path):
    (tmp_path / "rewards.py").write_text("import argparse\nparser = argparse.ArgumentParser()\nparser.exit(3)\n")
    assert check("score") == 2
    assert "cannot be imported: SystemExit: 3 (rewards.py, line 3" in capsys.readouterr().err
    assert main(["tasks", "show", "./rewards.py"]) == 2
    assert "cannot be imported: SystemExit: 3 (rewards.py, line 3" in capsys.readouterr().err
