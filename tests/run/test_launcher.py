"""What ties a process to its launcher: signals, and that none outlives it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rwkv_es.run import launcher
from rwkv_es.run.launcher import is_mistake, on_sigterm, under_launcher
from rwkv_es.system.errors import ClusterError, ConfigError, Terminated


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


MISTAKE = """
from rwkv_es.system import errors
from rwkv_es.run import launcher
with launcher.under_launcher():
    raise errors.{error}("what is wrong")
"""
PARENT = """
import os, subprocess, sys
child, *variables = sys.argv[-1].split("|")
environment = {**os.environ, **dict(variable.split("=") for variable in variables)}
print(subprocess.run([sys.executable, "-c", child], env=environment).returncode, flush=True)
"""
MARKS = "TORCHELASTIC_RUN_ID=none|TORCHELASTIC_RESTART_COUNT=0|MASTER_PORT=29500|RANK=0|LOCAL_RANK=0"


def family(tmp_path, program, marks="", error="ConfigError", environment=()):
    """Run a parent of some name whose child, marked by environment variables, fails. Returns what becomes of the parent."""
    path = tmp_path / program
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PARENT)
    argument = "|".join(filter(None, [MISTAKE.format(error=error), marks]))
    clean = {name: value for name, value in os.environ.items() if name not in MARKS}
    command = [sys.executable, "-X", "utf8", "-u", str(path), "launch", argument]
    settings = {"capture_output": True, "text": True, "timeout": 30}
    return subprocess.run(command, check=False, env={**clean, **dict(environment)}, **settings)


def marks():
    return dict(mark.split("=") for mark in MARKS.split("|"))


@pytest.mark.parametrize(
    "program", ["torchrun", "accelerate", "torch/distributed/run.py", "accelerate/commands/launch.py"]
)
def test_a_mistake_ends_the_launcher_that_would_start_it_again(tmp_path, program):
    done = family(tmp_path, program, MARKS)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, ""), done.stderr
    assert "what is wrong" in done.stderr


@pytest.mark.parametrize("error", ["ClusterError", "Terminated"])
def test_a_launcher_starts_again_what_is_lost(tmp_path, error):
    done = family(tmp_path, "torchrun", MARKS, error)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_a_parent_that_started_the_command_for_once_is_not_signalled(tmp_path):
    for program, own in [("notebook.py", MARKS), ("accelerate", ""), ("my/launch.py", MARKS)]:
        done = family(tmp_path, program, own)
        assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_a_parent_that_has_inherited_the_marks_of_its_own_launcher_is_not_signalled(tmp_path):
    for program in ("training.py", "accelerate"):
        done = family(tmp_path, program, environment=marks())
        assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    nested = family(tmp_path, "torchrun", "MASTER_PORT=29501", environment=marks())
    assert nested.returncode == -signal.SIGTERM, "a launcher under a launcher ends"


def test_a_shell_with_the_marks_is_not_signalled(tmp_path):
    (tmp_path / "mistake.py").write_text(MISTAKE.format(error="ConfigError"))
    script = f"'{sys.executable}' '{tmp_path}/mistake.py' torchrun; echo $?"
    settings = {"capture_output": True, "text": True, "timeout": 30}
    done = subprocess.run(["bash", "-c", script], check=False, env={**os.environ, **marks()}, **settings)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@pytest.mark.parametrize(
    "arguments, program",
    [
        ("/venv/bin/python3 /venv/bin/accelerate launch -m rwkv_es", "/venv/bin/accelerate"),
        ("python -X utf8 -u -m torch.distributed.run --nproc 2 train.py", "torch/distributed/run"),
        ("python -um accelerate.commands.launch", "accelerate/commands/launch"),
        ("python -c pass torchrun", "pass"),
        ("bash", ""),
    ],
)
def test_what_a_process_runs_is_told_by_its_command_line(arguments, program):
    assert launcher._program(arguments.split()) == program


@pytest.mark.parametrize(
    "error, is_it",
    [
        (ConfigError("wrong"), True),
        (ZeroDivisionError(), True),
        (MemoryError(), True),
        (SystemExit(2), True),
        (SystemExit(0), False),
        (SystemExit(), False),
        (ClusterError("rank 1 died"), False),
        (Terminated(), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_only_the_loss_of_a_process_and_the_wish_to_end_it_are_no_mistakes(error, is_it):
    assert is_mistake(error) == is_it


def test_again_is_told_of_mistakes_in_a_file_that_is_there(tmp_path, monkeypatch):
    told = tmp_path / "told"
    monkeypatch.setenv("RWKV_ES_AGAIN", str(told))
    launcher.tell_again("step")
    assert not told.exists(), "nothing is left on other machines"
    told.touch()
    launcher.tell_again("step")
    with pytest.raises(ConfigError), under_launcher():
        raise ConfigError("wrong")
    with pytest.raises(ClusterError), under_launcher():
        raise ClusterError("rank 1 died")
    assert told.read_text() == "step\nmistake\n"


WORK = """
import time
from rwkv_es.run.launcher import under_launcher
with under_launcher():
    print("ready", flush=True)
    time.sleep({seconds})
print("done", flush=True)
"""
DYING = """
import os, subprocess, sys
environment = {**os.environ, "TORCHELASTIC_RUN_ID": "1"}
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment, stdout=subprocess.PIPE, text=True)
assert child.stdout.readline() == "ready\\n"
"""


@pytest.mark.parametrize("program, seconds, is_launcher", [("torchrun", 600, True), ("mine.py", 1, False)])
def test_a_process_ends_with_its_launcher_but_not_with_any_parent(tmp_path, program, seconds, is_launcher):
    (tmp_path / program).write_text(DYING)
    command = [sys.executable, str(tmp_path / program), WORK.format(seconds=seconds)]
    environment = {name: value for name, value in os.environ.items() if name not in MARKS}
    settings = {"capture_output": True, "text": True, "timeout": 30}
    done = subprocess.run(command, check=False, env=environment, **settings)
    assert ("the launcher is gone" in done.stderr) == is_launcher
