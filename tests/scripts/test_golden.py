"""The golden runs' bits are those that were recorded on a platform like this one."""

import json
import subprocess
import sys

import pytest
from places import ROOT

RECORD = json.loads((ROOT / "tests" / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture
def golden(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import golden

    return golden


def skip_unrecorded(tag, command):
    pytest.skip(f"no golden run is recorded for {tag}; an unchanged checkout records it with: {command}")


def test_the_plain_run_ends_with_the_recorded_bits(golden):
    result = golden.result_of("plain")
    tag = golden.platform_tag()  # after a run: MKL's mode is settled by then
    if tag not in RECORD:
        skip_unrecorded(tag, golden.COMMAND)
    assert result == RECORD[tag]["plain"]


@pytest.mark.slow
def test_all_runs_end_with_the_recorded_bits(golden):
    done = subprocess.run([sys.executable, "scripts/golden.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, golden.UNRECORDED), done.stdout + done.stderr
    if done.returncode == golden.UNRECORDED:
        skip_unrecorded(done.stdout.splitlines()[1], golden.COMMAND)


def test_the_record_holds_whole_runs_that_two_processes_end_alike(golden):
    for tag, results in RECORD.items():
        assert set(results) == set(golden.RUNS), tag
        assert results["two_processes"] == results["plain"], tag
        for result in results.values():
            assert len(set(result["checksums"])) == 3, "a step that moves nothing shows nothing"


def test_a_difference_in_a_single_bit_and_a_platform_without_a_record_are_reported(golden, capsys):
    result = {"checksums": ["aa", "bb"], "export": "cc", "nll_per_token": 2.440689998143713}
    assert golden.compare("here", {"plain": result}, {"plain": result}) == 0
    moved = {**result, "nll_per_token": 2.4406899981437134}
    assert golden.compare("here", {"plain": result}, {"plain": moved}) == golden.DIFFERS
    assert "plain is DIFFERENT" in capsys.readouterr().out
    assert golden.compare("elsewhere", {}, {"plain": result}) == golden.UNRECORDED
    assert "elsewhere" in capsys.readouterr().out
