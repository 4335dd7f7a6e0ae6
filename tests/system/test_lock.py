"""A run folder has one owner, on one host or on several."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rwkv_es.system import lock
from rwkv_es.system.errors import ConfigError
from rwkv_es.system.lock import Lock


@pytest.fixture(params=[True, False], ids=["flock", "no flock"])
def between_hosts(request, monkeypatch):
    """Run with flock, and as on a network file system where each host locks for itself."""
    if not request.param:
        monkeypatch.setattr(lock.fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lock, "PATIENCE_S", 0.4)


def test_a_folder_is_taken_by_one_at_a_time(tmp_path, between_hosts):
    mine = Lock(tmp_path)
    with pytest.raises(ConfigError, match=rf"process {os.getpid()} on host .* is training in {tmp_path}"):
        Lock(tmp_path)
    mine.check()
    mine.release()
    mine.release()
    assert list(tmp_path.iterdir()) == []
    Lock(tmp_path).release()


def test_what_a_killed_process_has_left_is_no_obstacle(tmp_path, between_hosts):
    code = """
    import os, signal, sys
    from pathlib import Path
    from rwkv_es.system.lock import Lock
    Lock(Path(sys.argv[1]))
    os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=False)
    assert (tmp_path / ".rwkv-es-lock.json").exists()
    (tmp_path / ".rwkv-es-lock.json-0123abcd").write_text("{")  # killed in the midst of a beat
    start = time.monotonic()
    Lock(tmp_path).release()
    assert not list(tmp_path.iterdir())
    assert time.monotonic() - start < 5, "a process of this host is asked for by its number, not waited for"


def written_elsewhere(tmp_path, heartbeat):
    row = {"host": "node7", "pid": 12, "token": "t", "system": "another boot", "started": "1", "heartbeat": heartbeat}
    (tmp_path / ".rwkv-es-lock.json").write_text(json.dumps(row))


def test_another_hosts_lock_holds_as_long_as_its_heart_beats(tmp_path, between_hosts, monkeypatch):
    written_elsewhere(tmp_path, 1)
    sleep, count = time.sleep, iter(range(2, 1000))

    def beating(seconds):
        sleep(seconds)
        written_elsewhere(tmp_path, next(count))

    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=beating, monotonic=time.monotonic))
    with pytest.raises(ConfigError, match=r"process 12 on host node7 is training in .*remove .*lock\.json"):
        Lock(tmp_path)
    monkeypatch.setattr(lock, "time", time)
    Lock(tmp_path).release()  # it beats no more


def test_who_was_thought_gone_notices_that_the_folder_is_taken(tmp_path, between_hosts):
    mine = Lock(tmp_path)
    written_elsewhere(tmp_path, 1)
    with pytest.raises(ConfigError, match="process 12 on host node7 has taken over"):
        mine.check()
    mine.release()
    assert json.loads((tmp_path / ".rwkv-es-lock.json").read_text())["host"] == "node7", "what is another's stays"


@pytest.mark.parametrize("text", ["", "{", "[]", "\0"])
def test_a_damaged_lock_is_taken(tmp_path, between_hosts, text):
    (tmp_path / ".rwkv-es-lock.json").write_text(text)
    Lock(tmp_path).release()


def test_the_heart_beats(tmp_path, between_hosts):
    mine = Lock(tmp_path)
    first = (tmp_path / ".rwkv-es-lock.json").read_text()
    deadline = time.monotonic() + 10
    while (tmp_path / ".rwkv-es-lock.json").read_text() == first and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / ".rwkv-es-lock.json").read_text() != first
    mine.release()


def test_a_process_that_has_ended_and_nobody_waited_for_is_no_owner(tmp_path, between_hosts):
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        while Path("/proc", str(child.pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        started = Path("/proc", str(child.pid), "stat").read_text().rpartition(")")[2].split()[19]
        row = {"host": "h", "pid": child.pid, "token": "t", "system": lock._system(), "started": started}
        (tmp_path / ".rwkv-es-lock.json").write_text(json.dumps(row))
        Lock(tmp_path).release()


def test_a_beat_that_fails_is_not_the_last_one(tmp_path, between_hosts, monkeypatch, capsys):
    mine = Lock(tmp_path)
    real, failures = lock.Path.replace, iter([True] * 3)

    def full(path, target):
        if next(failures, False):
            raise OSError(28, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(lock.Path, "replace", full)
    (tmp_path / ".rwkv-es-lock.json").unlink()
    deadline = time.monotonic() + 10
    while not (tmp_path / ".rwkv-es-lock.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    mine.check()
    mine.release()
    assert list(tmp_path.iterdir()) == [] and "Traceback" not in capsys.readouterr().err


def test_a_lock_that_is_being_written_is_waited_for(tmp_path, between_hosts, monkeypatch):
    (tmp_path / ".rwkv-es-lock.json").touch()  # another host has just made it
    sleep, count = time.sleep, iter(range(1, 1000))

    def writing(seconds):
        sleep(seconds)
        written_elsewhere(tmp_path, next(count))

    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=writing, monotonic=time.monotonic))
    with pytest.raises(ConfigError, match="process 12 on host node7 is training in"):
        Lock(tmp_path)
