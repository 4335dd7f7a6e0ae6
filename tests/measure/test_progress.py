"""Signs of life: on a terminal only, and never in the way."""

import os
import pty
import subprocess
import sys

from places import ROOT

from rwkv_es.measure.progress import progress
from rwkv_es.system.streams import waiting

CODE = """
from rwkv_es.measure.progress import progress
from rwkv_es.system.streams import waiting
with progress("step 3", 8) as advance:
    advance(5)
print("done")
"""


def test_nothing_is_shown_in_a_pipe(capsys):
    with progress("step 1", 10) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


def on_a_terminal(code):
    """Run a program whose stderr is a terminal; return what it shows there and what it prints."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, text=True, cwd=ROOT
    ) as child:
        os.close(theirs)
        out = child.stdout.read()
        shown = b""
        try:
            while piece := os.read(ours, 4096):
                shown += piece
        except OSError:  # Linux's way to say that the other end is closed
            pass
    os.close(ours)
    return shown.decode(), out


def test_a_bar_is_shown_on_a_terminal():
    shown, out = on_a_terminal(CODE)
    assert "step 3" in shown and "5/8" in shown and out == "done\n"


def test_only_one_of_several_processes_shows_it():
    shown, out = on_a_terminal(CODE.replace('"step 3", 8', '"step 3", 8, False'))
    assert shown == "" and out == "done\n"


WAITING = """
from rwkv_es.system.streams import waiting
with waiting("loading [bold]\\\\x1bc"):
    print("out")
print("done")
"""


def test_what_takes_long_is_named_on_a_terminal_and_stdout_stays_as_it_is(capsys, monkeypatch):
    shown, out = on_a_terminal(WAITING)
    assert "loading [bold]" in shown and "\x1bc" not in shown and out == "out\ndone\n"
    monkeypatch.setenv("RANK", "1")
    assert on_a_terminal(WAITING) == ("", "out\ndone\n")
    with waiting("loading"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_command_says_at_once_that_it_starts_and_what_it_loads(tmp_path):
    code = f"import rwkv_es.cli as c; c.main(['train', '--steps', '0', '--eval-every', '0', '--run', {str(tmp_path / 'run')!r}])"
    shown, _ = on_a_terminal(code)
    assert shown.index("starting") < shown.index("loading ")
