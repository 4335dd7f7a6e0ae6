import json
import os
import subprocess
import sys

import interpreted  # noqa: F401  skips these tests where Triton is missing
from places import ROOT


def run(script, *options):
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / script), *options]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_host_loop_is_timed_with_texts_that_end():
    (found,) = run("bench_gpu_host.py", "--slots", "16", "--new", "24", "--requests", "64", "--samples", "2")
    assert found["requests"] == 64 and 0 < found["stopped_by_string"] < 64
    assert found["full_ticks"] > 0 and found["host_ms_per_full_tick"] > 0
