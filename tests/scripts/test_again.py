"""scripts/launch/again: a command that is lost starts anew, one that is mistaken does not for ever."""

import os
import subprocess

import pytest
from places import ROOT

AGAIN = ROOT / "scripts" / "launch" / "again"
COMMAND = """#!/usr/bin/env bash
printf '%s\\n' "$1" >>"$HERE/runs"
codes=($CODES)
[ "$(wc -l <"$HERE/runs")" != "$SLOW" ] || read -r -t 2.1 <> <(:) || true
exit "${codes[$(wc -l <"$HERE/runs") - 1]}"
"""


@pytest.fixture
def again(tmp_path):
    """Return a call of the script with a command that ends with the given codes in turn; nobody really sleeps."""
    for name, text in (("training", COMMAND), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def call(codes, **environment):
        path = f"{tmp_path}:{os.environ['PATH']}"
        variables = {**os.environ, "PATH": path, "HERE": str(tmp_path), "CODES": codes, "SLOW": "", **environment}
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


def test_what_fails_at_once_five_times_is_a_mistake_and_its_code_is_the_end(again):
    done, runs = again("1 1 1 1 7 0")
    assert (done.returncode, len(runs)) == (7, 5)


def test_failures_that_took_long_are_no_mistakes_however_many(again):
    done, runs = again("1 1 1 1 1 1 1 0", QUICK="0")  # every failure comes later than that
    assert (done.returncode, len(runs)) == (0, 8)


@pytest.mark.slow  # of all that the script does, only this takes real seconds
def test_a_failure_that_took_long_begins_the_count_anew(again):
    done, runs = again("1 1 1 1 1 1 1 1 0", QUICK="2", SLOW="4")
    assert (done.returncode, len(runs)) == (0, 9)
