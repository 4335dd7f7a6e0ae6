import json
import os
import subprocess
import sys

import interpreted  # noqa: F401  skips these tests where Triton is missing
import pytest
from places import ROOT


def run(script, *options, timeout=300):
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / script), *options]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_host_loop_is_timed_with_texts_that_end():
    (found,) = run("bench_gpu_host.py", "--slots", "16", "--new", "24", "--requests", "64", "--samples", "2")
    assert found["requests"] == 64 and 0 < found["stopped_by_string"] < 64
    assert found["full_ticks"] > 0 and found["host_ms_per_full_tick"] > 0


SHORT = ("ceilings", "products", "kernels", "update", "noise", "sampling", "host")


@pytest.mark.parametrize("cases", [SHORT, pytest.param((), marks=pytest.mark.slow)])
def test_the_gpus_bench_runs_dry(cases):
    """A small model in Triton's interpreter; what it says of bits holds there too."""
    found = run("bench_gpu.py", "--tiny", *cases, timeout=300 if cases else 1800)
    assert {line["case"] for line in found} >= {*SHORT, *(() if cases else ("check", "ticks", "fp8", "step"))}
    assert all({"name", "measured", "unit", "card"} <= line.keys() for line in found)
    if not cases:
        judged = {line["name"]: line["measured"] for line in found if line["case"] == "check"}
        assert judged["tokens of graphs and of plain calls are equal"] == judged["and of half as many slots"] == 1
        assert judged["logits against plain torch, relative"] < 0.06
        assert judged["logits of the model against float64 numpy, relative"] < 0.06
        for rank in (1, 4):
            assert judged[f"logits of W + sigma/sqrt(r) A B^T, rank {rank}, against float64 numpy, relative"] < 0.06
            assert judged[f"a text read at once has the bits of token by token, rank {rank}"] == 1


def test_without_its_program_the_sanitizers_command_is_printed():
    command = [sys.executable, str(ROOT / "scripts" / "bench_gpu.py"), "check", "--sanitizer"]
    environment = {**os.environ, "PATH": "", "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "compute-sanitizer is not there" in done.stderr and done.stderr.strip().endswith("bench_gpu.py check --tiny")
