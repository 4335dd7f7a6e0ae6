"""Compare the plan of a step on this CPU with the step itself: memory, and time by rates that are measured beside it.

    python scripts/check_plan.py model.pth --dtype bf16 --population 32 --prompts 2 --max-new-tokens 4 --turns 3

Options are those of `memory_step.py`, which takes the step (two in each process; the second one is timed).
Prints one JSON line with medians over the turns; `memory` and `time` are planned / measured. Seconds are those of the
processor (one thread), so that what else the machine does counts little.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rwkv_es.config.options import build
from rwkv_es.planning import benchmark
from rwkv_es.planning.plan import make_plan

MEMORY_STEP = Path(__file__).with_name("memory_step.py")


def main(argv: list[str]) -> int:
    """Print one JSON line."""
    place = argv.index("--turns") if "--turns" in argv else len(argv)
    turns, options = int((argv[place + 1 : place + 2] or ["3"])[0]), argv[:place] + argv[place + 2 :]
    benchmark.clock = time.thread_time
    steps, planned = [], []
    for _ in range(turns):
        steps.append(taken(options))
        planned.append(plan(options, steps[-1]["prompt_tokens"]))
    steps.append(taken(options))
    measured_s = statistics.median(step["cpu_seconds"] for step in steps)
    planned_s = statistics.median(found.times.generate_s + found.times.update_s for found in planned)
    peak = statistics.median(step["peak_bytes"] for step in steps)
    found = {
        "memory": round(planned[0].memory.peak / peak, 3),
        "time": round(planned_s / measured_s, 3),
        "planned_bytes": planned[0].memory.peak,
        "peak_bytes": peak,
        "planned_s": round(planned_s, 2),
        "measured_s": round(measured_s, 2),
        "all_planned_s": [round(found.times.generate_s + found.times.update_s, 2) for found in planned],
        "all_measured_s": [step["cpu_seconds"] for step in steps],
    }
    print(json.dumps({"options": " ".join(options), **found}))
    return 0


def taken(options: list[str]) -> dict[str, Any]:
    """Take two steps in a process of their own."""
    command = [sys.executable, str(MEMORY_STEP), *options, "--steps", "2", "--threads", "1"]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def plan(options: list[str], prompt_tokens: float) -> Any:
    """Plan the step."""
    model, *rest = options
    values = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(rest[::2], rest[1::2])}
    extra = {"threads": 1, "measure": True, "device": "cpu", "eval_every": 0, "prompt_tokens": round(prompt_tokens)}
    return make_plan(build({"model": model, **values, **extra}, "plan"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
