"""A run's folder is enough: to go on, and wherever a model or options are asked for."""

import json
import shutil

import pytest
import yaml
from jobs import arguments

from rwkv_es.cli import main
from rwkv_es.run.record import read_steps
from rwkv_es.run.weights import with_weights
from rwkv_es.system.errors import ConfigError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run of three steps, whose best weights were exported."""
    folder = tmp_path_factory.mktemp("runs") / "original"
    assert main(arguments(folder, steps=3, lr=0.05)) == 0
    return folder


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_resume_needs_nothing_but_the_folder_and_takes_more_steps(original, tmp_path, capsys):
    whole = tmp_path / "whole"
    assert main(arguments(whole, steps=4, lr=0.05)) == 0
    moved = original.rename(tmp_path / "moved")
    try:
        assert main(["resume", str(moved), "--steps", "4"]) == 0
        assert "after step 3" in capsys.readouterr().out
        assert [step.checksum for step in read_steps(moved)] == [step.checksum for step in read_steps(whole)]
    finally:
        moved.rename(original)


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_resume_of_what_is_no_run_is_refused(folder, capsys):
    assert main(["resume", *([folder] if folder else [])]) == 2
    assert "rwkv-es resume RUN" in capsys.readouterr().err


def test_a_run_stands_for_its_model_and_its_options(original, capsys):
    small = ["--eval-size", "3", "--max-new-tokens", "4"]
    assert main(["eval", str(original), *small]) == 0
    of_folder = last_json(capsys)
    exported = next(original.glob("*.pth"))
    options = yaml.safe_load((original / "config.yaml").read_text())
    assert main(["eval", str(exported), "--task", options["task"], *small]) == 0
    assert of_folder == last_json(capsys)
    assert main(["generate", "3 7 10=24:", "--model", str(original), "--max-new-tokens", "4"]) == 0
    assert main(["doctor", "--config", str(original / "config.yaml"), "--max-new-tokens", "4", "--eval-size", "2"]) == 0
    assert main(["eval", "--config", str(original), "--model", "tiny", *small]) == 0


def test_without_an_export_the_best_snapshot_is_the_model(original, capsys):
    exported = next(original.glob("*.pth"))
    hidden = exported.rename(exported.with_suffix(".hidden"))
    try:
        assert main(["generate", "3 7 10=24:", "--model", str(original), "--max-new-tokens", "4"]) == 0
        assert capsys.readouterr().out.strip()
    finally:
        hidden.rename(exported)


def with_options(original, place, **options):
    """Copy a run whose config.yaml says something else."""
    run = shutil.copytree(original, place)
    values = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**values, **options}))
    return run


@pytest.mark.parametrize("verb", ["train", "eval", "chat"])
def test_a_run_as_a_model_brings_the_tokenizer_that_it_was_made_with(original, tmp_path, verb):
    own = tmp_path / "own.json"
    own.write_text("{}")
    run = with_options(original, tmp_path / "run", tokenizer=str(own))  # the base has another one beside it
    assert with_weights({"model": str(run)}, verb)["tokenizer"] == str(own)
    assert with_weights({"model": str(run), "tokenizer": "mine.json"}, verb)["tokenizer"] == "mine.json"
    own.unlink()  # then there is the copy beside the export
    assert with_weights({"model": str(run)}, verb)["tokenizer"] == str(run / "rwkv7-tiny.tokenizer.json")
    assert with_weights({"model": str(with_options(original, tmp_path / "w", tokenizer="world"))}, verb)[
        "tokenizer"
    ] == ("world")


def test_a_run_as_a_model_brings_its_initial_state_or_is_refused(original, tmp_path):
    run = shutil.copytree(original, tmp_path / "run")
    state = run / "rwkv7-tiny-state.pth"
    assert "state" not in with_weights({"model": str(run)}, "eval")
    state.write_bytes(b"")
    assert with_weights({"model": str(run)}, "eval")["state"] == str(state)
    assert with_weights({"model": str(run), "state": "mine.pth"}, "eval")["state"] == "mine.pth"
    for verb, values in (("train", {"model": str(run)}), ("eval", {"base": str(run)})):
        with pytest.raises(ConfigError, match=r"has tuned an initial state.*snapshots/step-00000\d/model\.pth"):
            with_weights(values, verb)


def test_a_run_stands_for_the_base_of_a_comparison_too(original, capsys):
    assert main(["eval", "tiny", "--base", str(original), "--eval-size", "3", "--max-new", "4"]) == 0
    assert last_json(capsys)["base"]["model"] == str(original / "rwkv7-tiny.pth")


def test_int8_snapshots_are_no_model_before_they_are_exported(original, tmp_path):
    run = with_options(original, tmp_path / "run", quantize="int8")
    assert with_weights({"model": str(run)}, "eval")["model"] == str(run / "rwkv7-tiny.pth")
    (run / "rwkv7-tiny.pth").unlink()
    with pytest.raises(ConfigError, match=f"first: rwkv-es export {run}"):
        with_weights({"model": str(run)}, "eval")


def test_recipes_are_known_by_name(capsys):
    assert main(["train", "--config", "tiny", "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["targets"] == {"matrices": 1.0, "head.weight": 10.0}
    assert main(["train", "--config", "tinny", "--dry-run"]) == 2


def test_an_option_of_no_command_is_refused_in_any_file(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("sigma: 0.1\nsigmoid: 3\n")
    assert main(["eval", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "unknown option 'sigmoid' for eval" in capsys.readouterr().err


def test_a_moved_run_goes_on_where_it_is_when_its_own_config_is_given(original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved = original.rename(tmp_path / "moved")
    try:
        for number, config in enumerate(("moved/config.yaml", str(moved), str(moved / "config.yaml"))):
            assert main(["train", "--config", config, "--steps", str(4 + number)]) == 0
            assert len(read_steps(moved)) == 4 + number
        assert not original.exists()
    finally:
        moved.rename(original)


def test_what_somebody_has_put_into_a_runs_folder_is_never_replaced(original, tmp_path, capsys):
    run = shutil.copytree(original, tmp_path / "run")
    exported = next(run.glob("*.pth"))
    for path in (exported, run / "report.html"):
        whole = path.read_bytes()
        path.write_bytes(b"somebody's own")
        assert main(["resume", str(run), "--steps", "9"]) == 2
        assert f"{path.name} was not written by this run" in capsys.readouterr().err
        assert path.read_bytes() == b"somebody's own"
        path.write_bytes(whole)
    assert main(["resume", str(run), "--steps", "10"]) == 0
    assert exported.stat().st_size > 1000
