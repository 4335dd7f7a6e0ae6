"""Lists of runs, and what may be removed of them: never what a run has not made."""

import io
import shutil

import pytest
from folders import rising, write_run
from small_runs import checksums, run

from rwkv_es.cli import main
from rwkv_es.measure.page import write_report
from rwkv_es.system.lock import Lock


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = run(tmp_path_factory.mktemp("trained") / "run", snapshot_every=1, keep=3)
    write_report(folder)
    return folder


@pytest.fixture
def made(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs" / "mine")


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_runs_are_listed_with_sizes_and_scores_the_newest_first(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, steps in (("one", 2), ("group/two", 4)):
        write_run(tmp_path / "runs" / name, rising(steps))
        (tmp_path / "runs" / name / "weights.bin").write_bytes(bytes(2_000_000))
    assert main(["runs"]) == 0
    head, *rows, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "steps", "best", "size", "last", "change"]
    cells = {row.split()[0]: row.split()[1:-2] for row in rows}
    assert cells["runs/group/two"] == ["finished", "4/4", "0.100", "@", "0", "2.00", "MB"]
    assert cells["runs/one"][:2] == ["stopped", "2/4"]
    assert total == "2 runs, 4.00 MB"
    assert main(["runs", "elsewhere"]) == 2 and "there is no run in elsewhere" in capsys.readouterr().err


def test_snapshots_but_the_best_are_removed_and_the_run_goes_on_with_the_same_bits(made, trained, capsys):
    before = files_in(made)
    assert main(["clean", str(made), "--yes"]) == 0
    gone = before - files_in(made)
    assert gone and all(name.startswith("snapshots/step-") for name in gone)
    assert len(list(made.glob("snapshots/step-*"))) == 1
    assert "6 files" in capsys.readouterr().out
    shutil.rmtree(made / "snapshots")
    assert checksums(run(made, snapshot_every=1, keep=3)) == checksums(trained)


def test_a_whole_run_is_removed_but_for_what_it_has_not_made(made, capsys):
    (made / "notes.txt").write_text("mine")
    (made / "snapshots" / "step-000001").mkdir(exist_ok=True)
    (made / "snapshots" / "step-000001" / "mine.bin").write_text("mine")
    (made / "report.html").write_text("changed by hand")
    assert main(["clean", str(made), "--all", "--yes"]) == 0
    assert files_in(made) == {"notes.txt", "report.html", "snapshots/step-000001/mine.bin"}
    assert "keeps what the run has not made: notes.txt, report.html, snapshots" in capsys.readouterr().out


def test_a_folder_with_nothing_else_is_gone_afterwards(made):
    assert main(["clean", str(made), "--all", "--yes"]) == 0
    assert not made.exists()


@pytest.mark.parametrize("said, is_gone", [("y", True), ("n", False), ("", False)])
def test_it_asks_first(made, monkeypatch, said, is_gone):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: said)
    assert main(["clean", str(made), "--all"]) == 0
    assert made.exists() != is_gone


def test_an_end_of_input_is_no_consent(made, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO())  # Ctrl-D
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    before = files_in(made)
    assert main(["clean", str(made), "--all"]) == 0 and files_in(made) == before
    assert "nothing was removed" in capsys.readouterr().out


def test_where_nobody_can_be_asked_nothing_is_removed(made, monkeypatch, capsys):
    before = files_in(made)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert main(["clean", str(made)]) == 2 and "--yes" in capsys.readouterr().err
    assert files_in(made) == before


def test_a_run_that_trains_and_a_folder_that_is_no_run_are_left_alone(made, tmp_path, capsys):
    lock = Lock(made)
    try:
        assert main(["clean", str(made), "--yes"]) == 2 and "is training in" in capsys.readouterr().err
    finally:
        lock.release()
    assert main(["clean", str(tmp_path), "--yes"]) == 2 and "not the folder of a run" in capsys.readouterr().err


def test_links_are_not_followed(made, tmp_path):
    other = tmp_path / "other.pth"
    other.write_text("precious")
    (made / "snapshots" / "step-000001").mkdir(exist_ok=True)
    (made / "snapshots" / "step-000001" / "model.pth").unlink(missing_ok=True)
    (made / "snapshots" / "step-000001" / "model.pth").symlink_to(other)
    assert main(["clean", str(made), "--all", "--yes"]) == 0
    assert other.read_text() == "precious"


def test_what_lies_behind_links_is_never_removed(made, tmp_path):
    other = shutil.copytree(made, tmp_path / "other")
    (made / "snapshots" / "mine").mkdir()
    (made / "snapshots" / "mine" / "model.pth").write_text("mine")
    shutil.rmtree(made / "snapshots" / "step-000001", ignore_errors=True)
    (made / "snapshots" / "step-000001").symlink_to(other / "snapshots" / "step-000001")
    (made / "snapshots" / "step-000009").symlink_to("mine")
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "events.out.tfevents.1").write_text("of another run")
    shutil.rmtree(made / "tensorboard", ignore_errors=True)
    (made / "tensorboard").symlink_to(tmp_path / "events")
    before = files_in(other)
    assert main(["clean", str(made), "--all", "--yes"]) == 0
    assert files_in(other) == before and (tmp_path / "events" / "events.out.tfevents.1").exists()
    assert files_in(made) == {"snapshots/mine/model.pth"}


@pytest.mark.parametrize("config", ["model: my own\n", "", "made_with: me\n", "[" * 2000, "\0"])
def test_a_folder_whose_config_no_run_has_written_keeps_its_files(tmp_path, config, capsys):
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "ledger.jsonl").write_text('{"paid": 5}\n')
    assert main(["clean", str(tmp_path), "--all", "--yes"]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert files_in(tmp_path) == {"config.yaml", "ledger.jsonl"}


def test_a_training_that_begins_while_somebody_is_asked_keeps_its_files(made, monkeypatch, capsys):
    locks = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: locks.append(Lock(made)) or "y")
    before = files_in(made)
    assert main(["clean", str(made), "--all"]) == 2
    locks[0].release()
    assert "is training in" in capsys.readouterr().err and files_in(made) == before


def test_the_folder_where_one_stands_may_be_removed_under_several_names(made, monkeypatch):
    monkeypatch.chdir(made)
    assert main(["clean", ".", str(made), "--all", "--yes"]) == 0
    assert not made.exists()


def test_names_of_folders_command_no_terminal(tmp_path, capsys):
    folder = write_run(tmp_path / "a\x1b[2J\x9b31m", rising(2))
    for command in (["runs", str(tmp_path)], ["watch", str(folder)], ["report", str(folder)], ["clean", str(folder)]):
        assert main(command) in (0, 2)
        said = "".join(capsys.readouterr())
        assert "a\ufffd[2J\ufffd31m" in said and not {"\x1b", "\x9b"} & set(said)
