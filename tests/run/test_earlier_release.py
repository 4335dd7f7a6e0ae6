"""A run that an earlier release began continues with the same bits, with other slots and its base somewhere else."""

import json
import shutil
from pathlib import Path

import pytest
from places import ROOT

import rwkv_es
from rwkv_es.cli import main

RECORDED = ROOT / "tests" / "data" / "run_of_0_1_0"
COMMAND = (
    "train --model tiny --task countdown_mini --seed 2 --population 8 --prompts 4 --max-new-tokens 56 --sigma 0.02 --lr 0.03 "
    "--targets matrices=1,vectors=0.5,head.weight=6,emb.weight=2 --samples 2 --temperature 1 --weight-decay 0.1 "
    "--optimizer momentum --momentum 0.5 --eval-every 2 --eval-size 8 --snapshot-every 2 --keep 1 --reward-workers 0 "
    "--threads 1 --tracker none --device cpu"
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The run in the folder that 0.1.0 chose for it, below the working folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(RECORDED, tmp_path / "runs" / "countdown_mini-tiny-seed2")


def checksums(folder):
    return [json.loads(line)["checksum"] for line in (folder / "ledger.jsonl").read_text().splitlines()]


def go_on(argv, capsys, monkeypatch):
    """Run a command that continues the run; skip where this platform's arithmetic gives other bits than recorded."""
    code, printed = main(argv), capsys.readouterr()
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import golden

    tag, known = golden.platform_tag(), json.loads((RECORDED / "continued.json").read_text())
    if code and tag not in known and "weights" in printed.err:
        pytest.skip(f"the recorded steps have other bits on {tag}: {printed.err.splitlines()[-1]}")
    assert code == 0, printed.err
    return printed.out, known.get(tag)


def test_resume_with_a_moved_base_and_other_slots_takes_the_steps_that_the_old_release_took(
    run, tmp_path, capsys, monkeypatch
):
    moved = tmp_path / "mine.pth"
    for ending in (".pth", ".tokenizer.json"):
        shutil.copy(Path(rwkv_es.__file__).parent / "tiny" / f"rwkv7-tiny{ending}", moved.with_suffix(ending))
    out, expected = go_on(["resume", str(run), "--model", str(moved), "--slots", "24"], capsys, monkeypatch)
    assert "after step 4" in out
    assert checksums(run)[:4] == checksums(RECORDED)
    assert len(checksums(run)) == 6
    assert main(["replay", str(run)]) == 0
    assert "6 steps rebuilt" in capsys.readouterr().out
    assert (run / "snapshots" / "step-000002").is_dir(), "the best weights, whose snapshot was lost"
    if expected is None:
        pytest.skip("nothing is recorded of how 0.1.0 goes on here; rebuilding its steps and going on were tested")
    assert checksums(run)[4:] == expected


def test_the_same_command_finds_the_old_folder_rebuilds_its_weights_and_replaces_its_report(run, capsys, monkeypatch):
    for name in ("report.html", "rwkv7-tiny.pth"):
        (run / name).write_text("as 0.1.0 wrote it, without noting what it makes")
    out, _ = go_on([*COMMAND.split(), "--steps", "4", "--slots", "8"], capsys, monkeypatch)
    assert f"continuing {run.relative_to(run.parents[1])} after step 4" in out
    assert checksums(run) == checksums(RECORDED)
    assert main(["replay", "runs/countdown_mini-tiny-seed2"]) == 0
    assert [path.name for path in run.parent.iterdir()] == [run.name], "no second folder"
    assert (run / "rwkv7-tiny.pth").stat().st_size > 100_000 and "<html" in (run / "report.html").read_text()
