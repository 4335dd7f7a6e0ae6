"""Signs of life: on a terminal only, and never in the way."""

import os
import pty
import subprocess
import sys

from places import ROOT

from rwkv_es.measure.progress import progress

CODE = """
from rwkv_es.measure.progress import progress
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
