import json
import os
import subprocess
import sys

from places import ROOT


def test_the_script_finds_more_error_with_fewer_bits_and_the_same_direction():
    command = [sys.executable, str(ROOT / "scripts" / "precision_error.py"), "--texts", "1", "--population", "8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=120)
    found = {line["products"]: line for line in map(json.loads, done.stdout.splitlines())}
    errors = [line["logits_error"] for line in found.values()]
    assert next(iter(found)) == "fp32" and errors == sorted(errors) and errors[0] == 0
    assert all(line["signal"] > 0.9 for line in found.values())
