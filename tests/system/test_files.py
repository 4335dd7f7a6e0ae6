"""Files that survive a crash: whole or not at all, and on the disk when it is said."""

import errno
import os
import stat
from contextlib import nullcontext

import pytest

from rwkv_es.system import files
from rwkv_es.system.errors import ConfigError


def flushed(monkeypatch):
    """Note what is flushed to the disk: the inode and whether it is a folder, with the names in the folder then."""
    notes, fsync = [], os.fsync

    def noted(handle):
        found = os.fstat(handle)
        is_folder = stat.S_ISDIR(found.st_mode)
        notes.append((found.st_ino, sorted(os.listdir(handle)) if is_folder else None))
        fsync(handle)

    monkeypatch.setattr("os.fsync", noted)
    return notes


def test_a_replaced_file_is_flushed_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.replace(path, "old")
    notes = flushed(monkeypatch)
    files.replace(path, "new")
    assert notes == [(path.stat().st_ino, None), (tmp_path.stat().st_ino, ["a.json"])]
    assert path.read_text() == "new"


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where):
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, full)
    with pytest.raises(ConfigError, match=r"cannot write .*a\.json \(No space left on device\)"), files.writing(path):
        files.replace(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_rows_are_appended_and_flushed_where_it_is_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    notes = flushed(monkeypatch)
    files.append(path, [{"a": 0.1}, {"b": float("nan"), "c": "\ud800"}])
    assert not notes
    files.append(path, [{"d": [1, float("inf")]}], flush=True)
    assert notes == [(path.stat().st_ino, None)]
    assert path.read_bytes() == b'{"a": 0.1}\n{"b": null, "c": "\\ud800"}\n{"d": [1, null]}\n'
    rows = [row for _, row in files.stream_lines(path)]
    assert rows == [{"a": 0.1}, {"b": None, "c": "\ud800"}, {"d": [1, None]}]


@pytest.mark.parametrize("torn", [b'{"b": ', b'{"b": 2}', b'{"b": \n', b"7\n"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + torn)
    assert list(files.stream_lines(path)) == [(b'{"a": 1}\n', {"a": 1})]
    assert path.read_bytes() == b'{"a": 1}\n' + torn, "reading changes nothing"


@pytest.mark.parametrize("rest", [b'{"a": 1}\n', b'{"a'])
def test_a_broken_line_before_the_last_is_an_error(tmp_path, rest):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b\n' + rest)
    with pytest.raises(ConfigError, match=r"a\.jsonl line 2 is broken"):
        list(files.stream_lines(path))


def test_damaged_lines_are_left_out_where_nothing_depends_on_them(tmp_path):
    path = tmp_path / "a.jsonl"
    assert files.read_sound_lines(path) == []
    path.write_bytes(b'{"a": 1}\n{"b\n[1]\n{"a": 2}\n{"a": 3')
    assert files.read_sound_lines(path) == [{"a": 1}, {"a": 2}]
    files.keep_lines_(path, lambda row: row["a"] > 1)
    assert path.read_bytes() == b'{"b\n[1]\n{"a": 2}\n', "damaged ones stay for a person to look at; the torn end goes"


@pytest.mark.parametrize(("code", "is_fine"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_folder_that_cannot_be_flushed_is_no_reason_to_stop(tmp_path, monkeypatch, code, is_fine):
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if is_fine else pytest.raises(OSError):
        files.replace(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
