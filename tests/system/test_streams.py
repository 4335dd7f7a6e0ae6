"""Printing never ends a run: programs with every kind of output, run for real, since only a process has such streams."""

import os
import subprocess
import sys

import pytest
from folders import write_run

PRINTING = """
import logging, sys, warnings
from rwkv_es.system.streams import lost_output, make_unfailing
make_unfailing()
make_unfailing()
for stream in (sys.stdout, sys.stderr):
    print("plus-minus \\xb1, \\u4e2d, \\ud83d, \\udcff", file=stream, flush=True)
    stream.write("x" * 100_000)
warnings.warn("\\u4e2d")
logging.error("\\u4e2d")
with open(sys.argv[1], "w") as file:
    file.write(lost_output())
"""


def run(tmp_path, program=PRINTING, arguments=(), more=(), **settings):
    """Run a program; return it, and what it has written to its file at the end."""
    file = tmp_path / "at_the_end"
    file.unlink(missing_ok=True)
    environment = {**os.environ, **dict(more)}
    command = [sys.executable, "-c", program, str(file), *arguments]
    done = subprocess.run(command, check=False, env=environment, timeout=30, **settings)
    return done, file.read_text() if file.exists() else None


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "ascii:strict", "gbk"])
def test_what_an_encoding_lacks_is_escaped(tmp_path, encoding):
    done, lost = run(tmp_path, more={"PYTHONIOENCODING": encoding}.items(), capture_output=True)
    assert (done.returncode, lost) == (0, "")
    assert b"\\ud83d, \\udcff" in done.stdout and b"\\ud83d, \\udcff" in done.stderr
    shown = "\u4e2d".encode(encoding.partition(":")[0], "backslashreplace")
    assert done.stdout.count(shown) == 1 and done.stderr.count(shown) >= 2, "warnings and logs too"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_device_loses_what_is_printed_and_nothing_else(tmp_path, unbuffered):
    with open("/dev/full", "w") as full:
        done, lost = run(tmp_path, more={"PYTHONUNBUFFERED": unbuffered}.items(), stdout=full, stderr=full)
    assert (done.returncode, lost) == (0, "No space left on device")


def test_a_pipe_without_a_reader_is_no_loss(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done, lost = run(tmp_path, stdout=write, stderr=write)
    os.close(write)
    assert (done.returncode, lost) == (0, "")


def test_what_is_printed_to_closed_streams_reaches_no_file_that_is_opened_later(tmp_path):
    done, lost = run(tmp_path, preexec_fn=lambda: [os.close(handle) for handle in (0, 1, 2)])
    assert (done.returncode, lost) == (0, "")


def test_a_pipe_that_is_read_slowly_and_does_not_block_gets_everything(tmp_path):
    program = "import os; os.set_blocking(1, False); os.set_blocking(2, False)\n" + PRINTING
    done, lost = run(tmp_path, program, capture_output=True)
    assert (done.returncode, lost) == (0, "")
    assert done.stdout.count(b"x") == done.stderr.count(b"x") == 100_000


COMMAND = "import sys; from rwkv_es.cli import main; sys.exit(main(sys.argv[2:]))"


def test_a_command_whose_output_is_lost_says_so_and_one_whose_reader_has_enough_does_not(tmp_path):
    with open("/dev/full", "w") as full:
        done, _ = run(tmp_path, COMMAND, ["tasks"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert b"standard output could not be written (No space left on device)" in done.stderr
    read, write = os.pipe()
    os.close(read)
    done, _ = run(tmp_path, COMMAND, ["tasks"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [(["chat", "tiny"], 0, b""), (["clean", "run", "--all"], 2, b"nobody is there to be asked; --yes removes it")],
)
def test_a_command_that_asks_takes_a_closed_input_for_its_end(tmp_path, words, code, said):
    write_run(tmp_path / "run")
    close = {"preexec_fn": lambda: os.close(0), "cwd": tmp_path}
    done, _ = run(tmp_path, COMMAND, words, stderr=subprocess.PIPE, **close)
    assert done.returncode == code and said in done.stderr and b"Traceback" not in done.stderr


def test_a_training_ends_well_whatever_becomes_of_its_lines(tmp_path):
    options = "--population 4 --prompts 1 --max-new-tokens 4 --eval-size 2 --steps 1 --threads 1 --tracker none --run"
    with open("/dev/full", "w") as full:
        arguments = ["train", *options.split(), str(tmp_path / "run")]
        done, _ = run(tmp_path, COMMAND, arguments, {"PYTHONIOENCODING": "ascii"}.items(), stdout=full, stderr=full)
    assert done.returncode == 0
    assert (tmp_path / "run" / "report.html").exists()
