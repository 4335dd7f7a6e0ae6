"""A run's past can be built again, and whatever was changed in it is named."""

import json
import shutil

import pytest
import torch
from jobs import arguments

from rwkv_es.cli import main
from rwkv_es.run.identity import read_config
from rwkv_es.run.record import chained, read_steps
from rwkv_es.run.snapshots import snapshot_steps


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "original"
    assert main(arguments(folder, steps=6, keep=3, optimizer="momentum", lr=0.01, schedule="linear")) == 0
    assert len({step.checksum for step in read_steps(folder)}) > 3
    return folder


@pytest.fixture
def run(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def complaint(capsys, *argv):
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    return capsys.readouterr().err


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(folder, steps):
    """Write a ledger whose seals are whole."""
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chained(steps)))


def test_replay_rebuilds_and_verifies_every_step_and_snapshot_and_changes_nothing(run, capsys):
    before = files_of(run)
    assert main(["replay", str(run)]) == 0
    out = capsys.readouterr().out
    assert all(f"step {step.step + 1}: weights {step.checksum} as in the ledger" in out for step in read_steps(run))
    assert all(f"snapshot of step {number}: weights" in out for number in snapshot_steps(run))
    assert files_of(run) == before


def test_replay_of_one_step_goes_that_far(run, capsys):
    assert main(["replay", str(run), "--step", "2"]) == 0
    out = capsys.readouterr().out
    assert "step 2: weights" in out and "step 3" not in out
    assert "there is no step 7" in complaint(capsys, "replay", run, "--step", 7)


@pytest.mark.parametrize("number", range(6))
def test_any_flipped_bit_of_a_ledger_line_is_named(run, capsys, number):
    path = run / "ledger.jsonl"
    whole = path.read_bytes()
    start = len(b"\n".join(whole.split(b"\n")[:number])) + (number > 0)
    length = len(whole.split(b"\n")[number])
    for place in range(start + number, start + length, 41):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        text = complaint(capsys, "replay", run)
        assert f"ledger.jsonl line {number + 1}" in text, (place, text)


def test_changed_numbers_under_whole_seals_are_noticed_too(run, capsys):
    steps = read_steps(run)
    steps[3].fitness[0] += 1e-9
    rewrite(run, steps)
    assert "the fitness of step 3 does not follow its rewards" in complaint(capsys, "replay", run)


def test_a_changed_step_size_makes_other_weights(run, capsys):
    steps = read_steps(run)
    place = next(i for i, step in enumerate(steps) if any(step.fitness))
    steps[place] = steps[place]._replace(lr=steps[place].lr * 1.001)
    rewrite(run, steps)
    assert f"the weights rebuilt for step {place} have the checksum" in complaint(capsys, "replay", run)


@pytest.mark.parametrize("name", ["model.pth", "optimizer.pt", "meta.json"])
def test_a_flipped_bit_in_a_snapshot_is_named_and_the_run_goes_on_from_the_one_before(run, original, capsys, name):
    path = run / "snapshots" / "step-000006" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert "step-000006" in complaint(capsys, "replay", run)
    options = {"keep": 3, "optimizer": "momentum", "lr": 0.01, "schedule": "linear"}
    ledger = run / "ledger.jsonl"
    assert main(arguments(run, steps=6, **options)) == 0
    assert "a damaged snapshot is passed over" in capsys.readouterr().err
    assert ledger.read_bytes() == (original / "ledger.jsonl").read_bytes()


def test_another_base_is_refused(run, capsys):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(read_config(run)["made_with"]["base_sha256"], "f" * 64))
    assert "but the run's base has fff" in complaint(capsys, "replay", run)


def test_a_fork_shares_the_past_and_goes_its_own_way(run, tmp_path, capsys):
    other = tmp_path / "fork"
    assert main(["fork", str(run), "--step", "3", "--out", str(other)]) == 0
    assert read_steps(other) == read_steps(run)[:3]
    assert snapshot_steps(other) == [3]
    again = ["train", "--config", str(other / "config.yaml")]
    shutil.copytree(other, tmp_path / "same")
    assert main([*again, "--run", str(tmp_path / "same")]) == 0
    assert [step.checksum for step in read_steps(tmp_path / "same")] == [step.checksum for step in read_steps(run)]
    assert "holds a run with rank 1 (now 2)" in complaint(capsys, *again, "--rank", "2")
    assert main([*again, "--lr", "0.05", "--fitness", "rank", "--schedule", "constant"]) == 0
    assert read_steps(other)[:3] == read_steps(run)[:3]
    assert {step.lr for step in read_steps(other)[3:]} == {0.05}
    assert main(["replay", str(other)]) == 0
    assert "lr 0.05 (now 0.1)" in complaint(capsys, *again, "--lr", "0.1", "--steps", "8")


def test_a_fork_that_finds_no_room_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    """What stays would be in the way of the same command; a damaged line of the metrics is not."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": "two"}\n{"reward_mean": 1}\n')
    archive = "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"  # torch's words

    def full(*_):
        raise RuntimeError(archive)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        said = complaint(capsys, "fork", run, "--step", "3", "--out", tmp_path / "fork")
    assert "model.pth (not all of it found room: the disk is full" in said and archive not in said
    assert not (tmp_path / "fork").exists()
    assert main(["fork", str(run), "--step", "3", "--out", str(tmp_path / "fork")]) == 0


def test_a_fork_needs_a_step_and_an_empty_folder(run, tmp_path, capsys):
    assert "fork needs a step and a folder" in complaint(capsys, "fork", run, "--step", "2")
    assert "is not empty" in complaint(capsys, "fork", run, "--step", "2", "--out", run)
    assert "there is no step 9" in complaint(capsys, "fork", run, "--step", "9", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
