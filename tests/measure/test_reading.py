"""Run folders whose files hold anything at all: shown without what makes no sense."""

import json
import os

import pytest
from folders import OPTIONS, rising, write_run

from rwkv_es.cli import main

ROWS = [
    {"step": "x", "reward_mean": 1.0},
    {"step": None, "eval/reward": 9.0},
    {"step": [1], "reward_mean": 9.0},
    {"step": True, "reward_mean": 9.0},
    {"step": 10**400, "reward_mean": 9.0},
    {"step": 2, "reward_mean": 10**400, "elapsed_s": "q", "tokens_read": "9", "eval/reward": "high"},
    {"step": 3, "eval/reward": None, "generate_s": 0.0, "reward_mean": 0.2},
]
SAMPLES = [{"step": "x", "kind": ["held out"]}, {"step": [2]}, {"step": 1, "kind": {}, "prompt": 5, "reward": "z"}]


@pytest.mark.parametrize("verb", ["watch", "report", "runs"])
@pytest.mark.parametrize("tail", ["", "[" * 100_000, '{"step":' + "9" * 5000 + "}", "\x00\n{"])
def test_lines_of_other_kinds_are_left_out(tmp_path, capsys, verb, tail):
    folder = write_run(tmp_path / "run", [*rising(3), *ROWS], SAMPLES)
    for name in ("metrics.jsonl", "samples.jsonl", "snapshots/best.json"):
        os.makedirs(folder / "snapshots", exist_ok=True)
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(tail)
    assert main([verb, str(folder)]) == 0
    said = capsys.readouterr().out
    assert {"watch": "stopped after 3 of 4", "report": "wrote", "runs": "3/4"}[verb] in said
    if verb == "report":
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert '"best":0.75' not in page and "9.0" not in json.dumps(page.partition('"reward_mean"')[2][:200])


@pytest.mark.parametrize("verb", ["watch", "report"])
@pytest.mark.parametrize(
    "options", [OPTIONS.replace("steps: 4", f"steps: {value}") for value in ("many", "null", "[1]", "-1", "1.5", "yes")]
)
def test_a_number_of_steps_that_is_none_is_a_damaged_config(tmp_path, capsys, verb, options):
    folder = write_run(tmp_path / "run", rising(3), options=options)
    assert main([verb, str(folder)]) == 2
    assert "config.yaml is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("best", ['{"step": 1e999, "score": 1}', "[" * 100_000, '{"step": "x"}', "5"])
def test_a_damaged_note_of_the_best_is_none(tmp_path, best):
    folder = write_run(tmp_path / "run", rising(3))
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / "best.json").write_text(best)
    assert main(["runs", str(folder)]) == 0
