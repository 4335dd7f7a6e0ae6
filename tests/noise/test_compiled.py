"""Kernels whose compiled code cannot be kept on the disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

DOUBLED = """
from rwkv_es.noise.compiled import compiled, num_compiled

@compiled()
def doubled(x):
    return 2 * x

print(doubled(21), num_compiled())
"""


def run(folder, **environment):
    """Run a kernel of a script in a folder and return the finished process."""
    (folder / "script.py").write_text(DOUBLED)
    full = {**os.environ, "PYTHONPATH": str(Path.cwd()), **environment}
    command = [sys.executable, folder / "script.py"]
    return subprocess.run(command, env=full, check=False, capture_output=True, text=True, timeout=120)


def test_kernels_are_kept_and_found_again(tmp_path):
    for num_compiled in (1, 0):
        done = run(tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "kept"))
        assert (done.returncode, done.stdout, done.stderr) == (0, f"42 {num_compiled}\n", "")
        assert len(list((tmp_path / "kept").rglob("*.nbc"))) == 1


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path):
    (tmp_path / "__pycache__").write_text("no folder")
    nowhere = str(tmp_path / "__pycache__" / "kept")
    done = run(tmp_path, NUMBA_CACHE_DIR=nowhere, HOME=nowhere, XDG_CACHE_HOME=nowhere)
    assert (done.returncode, done.stdout) == (0, "42 1\n"), done.stderr
    assert done.stderr.count("NUMBA_CACHE_DIR names a folder") == 1 and "Traceback" not in done.stderr


def test_a_damaged_cache_costs_time_only(tmp_path):
    run(tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "kept"))
    for path in (tmp_path / "kept").rglob("*.nb?"):
        path.write_bytes(path.read_bytes()[:20])
    done = run(tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "kept"))
    assert (done.returncode, done.stdout) == (0, "42 1\n"), done.stderr
    assert "Traceback" not in done.stderr


def test_kernels_are_not_interpreted_where_numba_is_told_not_to_compile(tmp_path):
    done = run(tmp_path, NUMBA_DISABLE_JIT="1")
    assert done.returncode == 1 and "ImportError: NUMBA_DISABLE_JIT is set" in done.stderr
