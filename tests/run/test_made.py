"""What a run has not made, or somebody has changed, is not replaced; what a crash has left unfinished is."""

import pytest

from rwkv_es.run import made
from rwkv_es.system.errors import ConfigError


def write(folder, name, text):
    with made.making(folder, [folder / name]):
        (folder / name).write_text(text)


def test_a_file_is_replaced_if_the_run_wrote_it_and_nobody_changed_it(tmp_path):
    made.begin(tmp_path)
    write(tmp_path, "report.html", "one")
    write(tmp_path, "report.html", "two")
    (tmp_path / "report.html").write_text("mine")
    (tmp_path / "model.pth").write_text("mine, too")
    for name in ("report.html", "model.pth"):
        with pytest.raises(ConfigError, match=f"{name} was not written by this run"):
            write(tmp_path, name, "three")
        assert (tmp_path / name).read_text().startswith("mine")


@pytest.mark.parametrize("is_written", [False, True])
def test_what_a_crash_left_unfinished_can_be_made_again(tmp_path, is_written):
    made.begin(tmp_path)
    write(tmp_path, "report.html", "before")
    with pytest.raises(KeyboardInterrupt), made.making(tmp_path, [tmp_path / "report.html"]):
        if is_written:
            (tmp_path / "report.html").write_text("after")
        raise KeyboardInterrupt
    write(tmp_path, "report.html", "again")
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ConfigError):
        write(tmp_path, "report.html", "no more")


def test_all_files_of_a_run_without_a_note_are_its_own(tmp_path):
    for name in ("report.html", "model.pth"):
        (tmp_path / name).write_text("of an earlier release")
    write(tmp_path, "report.html", "new")
    write(tmp_path, "model.pth", "new")
    (tmp_path / "other.pth").write_text("put there since")
    with pytest.raises(ConfigError):
        write(tmp_path, "other.pth", "new")


def test_what_another_process_notes_meanwhile_is_kept(tmp_path):
    made.begin(tmp_path)
    with made.making(tmp_path, [tmp_path / "m.pth"]):
        (tmp_path / "m.pth").write_text("weights")
        with made.making(tmp_path, [tmp_path / "report.html"]):
            (tmp_path / "report.html").write_text("page")
    with made.making(tmp_path, [tmp_path / "report.html", tmp_path / "m.pth"]):
        pass
