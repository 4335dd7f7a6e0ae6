"""What the machine lacks is said in one sentence; a bug keeps its traceback."""

import subprocess
import sys

import pytest

from rwkv_es.cli import main
from rwkv_es.system.errors import in_plain_words


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError(), "out of memory"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes"), "out of memory"),
        (OSError(36, "File name too long", "aaa"), "File name too long: 'aaa'"),
        (PermissionError(13, "Permission denied", "a", None, "b"), "Permission denied: 'a' and 'b'"),
        (ConnectionError("no route"), "no route"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deep"),
        (UnicodeEncodeError("ascii", "\u4e2d", 0, 1, "ordinal not in range"), "PYTHONUTF8=1"),
        (ZeroDivisionError("division by zero"), ""),
        (ValueError("a bug"), ""),
    ],
)
def test_what_the_machine_lacks_is_said_and_a_bug_is_not(error, words):
    said = in_plain_words(error)
    assert words in said and bool(said) == bool(words)
    assert "\n" not in said


def test_a_library_that_an_environment_variable_breaks_is_named_with_it(monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "0")
    program = "import sys; from rwkv_es.cli import main; sys.exit(main(['generate', 'hi']))"
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "unset NUMBA_NUM_THREADS=0" in done.stderr


def test_nesting_that_nobody_writes_is_one_line(tmp_path, capsys):
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    assert main(["train", "--config", str(tmp_path / "deep.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["run", "model", "tokenizer", "task", "reward", "shots", "system"])
def test_a_nul_in_a_text_is_refused_by_the_options_name(tmp_path, capsys, name):
    (tmp_path / "nul.yaml").write_text(f'{name}: "a\\0b"\n')
    assert main(["train", "--config", str(tmp_path / "nul.yaml")]) == 2
    assert f"{name} must not hold the character NUL" in capsys.readouterr().err


LONG = "a" * 300


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--run", LONG],
        ["train", "--model", LONG],
        ["train", "--task", LONG],
        ["train", "--task", "jsonl", "--data", LONG],
        ["train", "--config", f"{LONG}.yaml"],
        ["train", "--tokenizer", LONG],
        ["eval", LONG],
        ["eval", "--text", LONG],
        ["eval", "--state", LONG],
        ["export", LONG],
        ["replay", LONG],
        ["resume", LONG],
        ["fork", LONG, "--step", "1", "--out", "b"],
        ["tasks", "show", LONG],
    ],
)
def test_a_path_that_is_too_long_is_one_line(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*argv]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("rwkv-es: note: ")]
    assert len(said) == 1
