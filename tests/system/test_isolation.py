"""Processes that are ended with all that they have started."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkv_es.system import isolation

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems list no descendants")
TREE = "sleep 1000 & setsid sleep 1000 & setsid sh -c 'setsid sleep 1000 & sleep 1000 & echo; wait' & wait"


def with_mark(mark):
    """Return the processes that run and have a variable of this value."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_marked = f"TREE_OF={mark}".encode() in (folder / "environ").read_bytes()
            if is_marked and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(folder.name)
        except OSError:
            pass
    return found


@pytest.mark.parametrize("is_listed", [True, False])
def test_who_ends_a_process_ends_its_descendants_in_sessions_of_their_own(monkeypatch, is_listed):
    if is_listed and not isolation._are_listed():
        pytest.skip("this system does not keep lists of children")
    monkeypatch.setattr(isolation, "_are_listed", lambda: is_listed)
    mark, limit = f"{time.time()}", time.monotonic() + 30
    process = subprocess.Popen(
        ["sh", "-c", TREE], env={"TREE_OF": mark, "PATH": "/usr/bin:/bin"}, start_new_session=True
    )
    try:
        while len(with_mark(mark)) < 6 and time.monotonic() < limit:
            time.sleep(0.02)
        assert len(with_mark(mark)) == 6, "two shells and four that sleep"
        isolation.end_processes(process.pid)
        process.wait()
        while with_mark(mark) and time.monotonic() < limit:
            time.sleep(0.02)
        assert with_mark(mark) == []
    finally:
        for left in with_mark(mark):
            subprocess.run(["kill", "-9", left], check=False)
