"""scripts/launch/again: a command that is lost starts anew, one that is mistaken does not for ever."""

import os
import subprocess
import sys

import pytest
from places import ROOT

AGAIN = ROOT / "scripts" / "launch" / "again"
COMMAND = """#!/usr/bin/env bash
printf '%s\\n' "$1" >>"$HERE/runs"
count=$(wc -l <"$HERE/runs")
codes=($CODES) words=($WORDS)
[ "${words[count - 1]:--}" == - ] || echo "${words[count - 1]}" >>"$RWKV_ES_AGAIN"
exit "${codes[count - 1]}"
"""


@pytest.fixture
def again(tmp_path):
    """Return a call of the script with a command that ends with the given codes in turn; nobody really sleeps."""
    for name, text in (("training", COMMAND), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def call(codes, **environment):
        path = f"{tmp_path}:{os.environ['PATH']}"
        variables = {**os.environ, "PATH": path, "HERE": str(tmp_path), "CODES": codes, "WORDS": "", **environment}
        argv = [str(AGAIN), "training", "one word", "--two"]
        done = subprocess.run(argv, env=variables, check=False, capture_output=True, text=True, timeout=30)
        return done, (tmp_path / "runs").read_text().splitlines()

    return call


def test_what_succeeds_runs_once_with_its_arguments_as_they_were_given(again):
    done, runs = again("0")
    assert (done.returncode, runs, done.stderr) == (0, ["one word"], "")


def test_what_fails_starts_again_until_it_succeeds(again):
    done, runs = again("1 1 0")
    assert (done.returncode, len(runs)) == (0, 3)
    assert done.stderr.count("starting again") == 2


def test_five_failures_without_a_step_are_enough(again):
    done, runs = again("1 1 1 1 7 0")
    assert (done.returncode, len(runs)) == (7, 5)


def test_a_step_begins_the_count_anew(again):
    done, runs = again("1 1 1 1 1 1 1 1 0", WORDS="- - - step")
    assert (done.returncode, len(runs)) == (0, 9)
    done, runs = again("1 1 1 1 1 1 1 1 1 0", WORDS=" ".join(["step"] * 9))
    assert done.returncode == 0


def test_a_mistake_ends_at_once_whatever_the_launcher_makes_of_its_code(again):
    done, runs = again("1 1 0", WORDS="step mistake")
    assert (done.returncode, len(runs)) == (2, 2)


@pytest.mark.parametrize("code", [2, 126, 127, 130])
def test_codes_that_would_come_again_end_at_once(again, code):
    done, runs = again(f"75 {code} 0")
    assert (done.returncode, len(runs)) == (code, 2)


def test_a_training_tells_of_its_mistake_and_of_its_steps(again, tmp_path):
    run = [
        "--population",
        "4",
        "--prompts",
        "1",
        "--max-new-tokens",
        "4",
        "--eval-every",
        "0",
        "--steps",
        "1",
        "--threads",
        "1",
        "--tracker",
        "none",
    ]
    told = tmp_path / "told"
    told.touch()
    environment = {**os.environ, "RWKV_ES_AGAIN": str(told), "OMP_NUM_THREADS": "1"}
    for more in ([], ["--population", "7"]):
        command = [sys.executable, "-m", "rwkv_es", "train", *run, "--run", str(tmp_path / "run"), *more]
        subprocess.run(command, env=environment, check=False, capture_output=True, timeout=60)
    assert told.read_text() == "step\nmistake\n"
