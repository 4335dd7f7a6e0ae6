"""Kill a training again and again, anywhere and at any moment; it must end with the bits of an undisturbed run.

python scripts/kill_test.py --kills 30 --steps 40 --processes 2

Each kill -9 hits the launcher or one of its processes. `accelerate launch --max_restarts` restarts what died; when the
launcher itself died, the same command is given again.
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

LAUNCH = Path(__file__).parent / "launch" / "cpu.yaml"
RESTARTS = 1000
# The embedded model answers too fast to be hit in a step: a reward that takes its time over wrong answers (the right
# ones are looked at before a run) makes steps long enough.
TASK = """
import time
from rwkv_es.task import load_task
task = load_task("countdown_mini")
VERSION, STOP, MAX_NEW_TOKENS, TEMPLATE = "1", task.stop, task.max_new_tokens, task.template
def problems(split, data=""):
    return task.problems(split)
def reward(problem, text):
    found = task.reward(problem, text)
    time.sleep({seconds} if found < 1 else 0)
    return found
"""


class Kill(NamedTuple):
    """What is killed, and when."""

    victim: int  # 0: the launcher, else the place of a process
    is_in_training: bool  # the time counts from the first step that this start has taken, else from the start
    after_s: float


def main(argv: list[str] | None = None) -> int:
    """Run both trainings and compare the weights of every step. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Kill a training at random and compare it with an undisturbed one.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--longest", type=float, default=4.0, help="most seconds between a start, or its first step, and a kill"
    )
    parser.add_argument("--score-seconds", type=float, default=0.2, help="seconds that the reward takes per answer")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    draw = random.Random(given.seed)
    kills = [
        Kill(draw.randrange(given.processes + 1), draw.random() < 0.6, draw.uniform(0, given.longest))
        for _ in range(given.kills)
    ]
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = run_undisturbed(Path(folder), given.steps)
        num_starts = run_killed(Path(folder), given, kills)
        disturbed = checksums(Path(folder) / "killed")
        replayed = quietly(["replay", f"{folder}/killed"])
    is_same = disturbed == undisturbed and replayed == 0
    print(f"{len(kills)} kills, {num_starts} starts of the launcher, {len(disturbed)} steps: ", end="")
    print("the same bits in every step, and replay agrees" if is_same else f"DIFFERENT: {undisturbed} {disturbed}")
    return 0 if is_same else 1


def command(folder: Path, name: str, steps: int, score_seconds: float) -> list[str]:
    """Return the arguments of a small training in folder/name, with a reward that takes its time."""
    task = folder / name / "task.py"
    task.parent.mkdir(exist_ok=True)
    task.write_text(TASK.format(seconds=score_seconds), encoding="utf-8")
    sizes = f"--steps {steps} --population 8 --prompts 2 --max-new-tokens 40 --eval-size 4 --eval-every 5"
    noise = "--snapshot-every 3 --sigma 0.02 --lr 0.02 --targets matrices=1,head.weight=3 --threads 1 --device cpu"
    ours = ["--tracker", "none", "--rank-timeout", "30", "--task", str(task), "--run", str(folder / name)]
    return ["train", *sizes.split(), *noise.split(), *ours]


def run_undisturbed(folder: Path, steps: int) -> list[str]:
    """Train in one process; return the checksum of every step's weights."""
    if quietly(command(folder, "undisturbed", steps, 0)):
        raise RuntimeError("the undisturbed training failed")
    return checksums(folder / "undisturbed")


def quietly(argv: list[str]) -> int:
    """Run a command line of rwkv-es here, without its output. Returns the exit code."""
    from rwkv_es.cli import main

    with contextlib.redirect_stdout(io.StringIO()):
        return main(argv)


def run_killed(folder: Path, given: argparse.Namespace, kills: list[Kill]) -> int:
    """Train in several processes until the end, through all kills. Returns how often the launcher was started."""
    arguments = command(folder, "killed", given.steps, given.score_seconds)
    launch = ["--config_file", str(LAUNCH), "--num_processes", str(given.processes), "--max_restarts", str(RESTARTS)]
    waiting, num_starts = list(kills), 0
    while True:
        num_starts += 1
        launcher = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "rwkv_es", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        while waiting and launcher.poll() is None:
            strike_(launcher, waiting.pop(0), given.processes, folder / "killed")
            print(f"{len(kills) - len(waiting)} kills, {len(checksums(folder / 'killed'))} steps", flush=True)
        if launcher.wait() == 0 and not waiting:
            return num_starts
        if num_starts > 3 * len(kills) + 3:
            raise RuntimeError("the training does not come to an end")


def strike_(launcher: subprocess.Popen[bytes], kill: Kill, num_processes: int, run: Path) -> None:
    """Wait until the launcher has all its processes (and has taken a step), then a while, and kill."""
    deadline = time.monotonic() + 60
    while len(children := children_of(launcher.pid)) < num_processes and launcher.poll() is None:
        if time.monotonic() > deadline:
            raise RuntimeError("the launcher does not start its processes")
        time.sleep(0.02)
    num_steps = len(checksums(run))
    while kill.is_in_training and len(checksums(run)) == num_steps and launcher.poll() is None:
        time.sleep(0.02)
    time.sleep(kill.after_s)
    victims = [launcher.pid, *(children_of(launcher.pid) or children)]
    try:
        os.kill(victims[kill.victim % len(victims)], signal.SIGKILL)
    except ProcessLookupError:
        return
    if victims[kill.victim % len(victims)] == launcher.pid:
        launcher.wait()


def children_of(parent: int) -> list[int]:
    """Return a process's children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def checksums(folder: Path) -> list[str]:
    """Return the checksum of every step in a run folder's ledger."""
    path = folder / "ledger.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line)["checksum"] for line in lines if line.endswith("}")]


if __name__ == "__main__":
    sys.exit(main())
