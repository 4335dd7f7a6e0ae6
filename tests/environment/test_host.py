"""How many children the host of environments makes; it runs here, in a thread."""

import contextlib
import os
import pickle
import signal
import threading
import time
from multiprocessing import Pipe

import pytest

from rwkv_es.environment import host
from rwkv_es.environment.children import Staging, is_crowded
from rwkv_es.task import Done, Problem


@contextlib.contextmanager
def asked(environment, count):
    """Ask the environments of so many episodes. Hands over a function that waits for what all of them say."""
    ours, theirs = Pipe()
    hosting = host.Host(theirs, environment, Staging("", "", 60.0, 1e9, 1, 1000))

    def run():
        with contextlib.suppress(EOFError):
            hosting.run()

    def told():
        found = {}
        while len(found) < count and ours.poll(60):
            found.update(pickle.loads(ours.recv_bytes()))
        return found

    thread = threading.Thread(target=run)
    thread.start()
    ours.send_bytes(pickle.dumps([(i, Problem("", "", {"i": i}), ["a"]) for i in range(count)]))
    try:
        yield told
    finally:
        for pid in [child.pid for child in hosting.children]:  # they have copies of the pipe
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        ours.close()
        thread.join(60)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Two children in any case, eight at most; and nobody else's children are reaped."""
    monkeypatch.setattr(host, "CHILDREN", 2)
    monkeypatch.setattr(host, "MOST_CHILDREN", 8)
    monkeypatch.setattr(host, "reaped", lambda: ())


@pytest.mark.parametrize("crowded", [False, True])
def test_where_processors_are_free_each_slow_environment_has_a_child(monkeypatch, tmp_path, crowded):
    monkeypatch.setattr(host, "is_crowded", lambda: crowded)
    seen = 2 if crowded else 6

    def environment(problem):
        yield
        (tmp_path / str(problem.meta["i"])).touch()
        while len(list(tmp_path.iterdir())) < seen:  # each waits for the others, in a process that it blocks
            time.sleep(0.01)
        time.sleep(0.1)
        return Done(1.0, str(os.getpid()))

    with asked(environment, 6) as told:
        found = told()
    assert len(found) == 6 and {said.error for said in found.values()} == {""}
    processes = len({said.text for said in found.values()})
    assert processes == 2 if crowded else processes == 6


def test_where_the_system_makes_no_more_processes_those_that_are_there_go_on(monkeypatch):
    fork, calls = os.fork, []

    def limited():
        calls.append(1)
        if len(calls) > 1:
            raise BlockingIOError("Resource temporarily unavailable")
        return fork()

    def environment(problem):
        yield
        time.sleep(0.02)
        return Done(1.0, str(os.getpid()))

    monkeypatch.setattr(os, "fork", limited)
    with asked(environment, 12) as told:
        found = told()
    assert [said.reward for said in found.values()] == [1.0] * 12
    assert len({said.text for said in found.values()}) == 1 and len(calls) > 1


def test_a_machine_with_many_that_want_to_run_is_crowded(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 10**6)
    assert not is_crowded()
    monkeypatch.setattr(os, "cpu_count", lambda: 0.1)  # this process runs
    assert is_crowded()
