"""What ties a process to its launcher: signals, and that none outlives it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rwkv_es.errors import ConfigError, Terminated
from rwkv_es.run.launcher import on_sigterm, under_launcher


@pytest.fixture
def handler(monkeypatch):
    """What SIGTERM did before, which must be so again afterwards."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def handler(*_):
        pass

    before = signal.signal(signal.SIGTERM, handler)
    yield handler
    signal.signal(signal.SIGTERM, before)


def test_sigterm_ends_what_runs_and_means_afterwards_what_it_meant_before(handler):
    with pytest.raises(Terminated), under_launcher():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_mistake_leaves_signals_as_they_were(handler):
    with pytest.raises(ConfigError), under_launcher():
        raise ConfigError("what is wrong")
    assert signal.getsignal(signal.SIGTERM) is handler


def test_in_another_thread_signals_are_left_alone(handler):
    seen = []

    def work():
        with under_launcher():
            seen.append(signal.getsignal(signal.SIGTERM))
        seen.append(on_sigterm(signal.SIG_IGN))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert seen == [handler, None] and signal.getsignal(signal.SIGTERM) is handler


def outcome(program, *arguments):
    """Run a program; it is over when nothing that it started holds its output any more."""
    command = [sys.executable, "-c", program, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=30, env=environment)


SHELL = """
import subprocess, sys
print(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode, flush=True)
"""
MISTAKE = """
from rwkv_es import errors
from rwkv_es.run import launcher
with launcher.under_launcher():
    raise errors.ConfigError("what is wrong")
"""


def test_a_mistake_without_a_launcher_signals_nobody():
    done = outcome(SHELL, MISTAKE)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


DYING_LAUNCHER = """
import subprocess, sys
environment = {"TORCHELASTIC_RUN_ID": "1"}
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment, stdout=subprocess.PIPE, text=True)
assert child.stdout.readline() == "ready\\n"
"""
WORK = """
import time
from rwkv_es.run.launcher import under_launcher
with under_launcher():
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_process_whose_launcher_is_gone_ends_and_says_why():
    done = outcome(DYING_LAUNCHER, WORK)
    assert done.returncode == 0, done.stderr
    assert "the launcher is gone" in done.stderr
