"""Tune the embedded model on Countdown and let the `rwkv` package judge it before and after.

The last line of output is one JSON object: accuracy_before, accuracy_after, seconds, export, seed.
Arguments that are not listed here go on to `rwkv-es train`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import rwkv_es
from rwkv_es.measure.page import write_report
from rwkv_es.run.ledger import read_metrics
from rwkv_es.system.curve import curve, series

TINY = Path(rwkv_es.__file__).parent / "tiny"
BASE, RECIPE = TINY / "rwkv7-tiny.pth", TINY / "recipe.yaml"
CLIENT = Path(__file__).with_name("rwkv_client.py")
TASK = "countdown_mini"
MARK = "made-by-demo"  # a folder without this file is somebody's own run
NUM_SHOWN = 3


def main() -> int:
    """Run the five acts."""
    options, for_train = _parse()
    began = time.perf_counter()
    run = Path("runs") / f"demo-seed{options.seed}"
    if not _is_cleared(run):
        return 2
    _say(f"1. The embedded model, judged by the rwkv package on {options.size} held-out problems")
    before = judge(BASE, options.size)
    print(f"accuracy {before['accuracy']:.1%}")
    _say("2. Training: evolution strategies, inference only")
    rwkv("train", "--config", str(RECIPE), "--seed", str(options.seed), "--run", str(run), *for_train)
    _say("3. Export")
    exported = run / BASE.name
    rwkv("export", str(run), "--out", str(exported))
    _say("4. The exported file, judged by the rwkv package on the same problems")
    after = judge(exported, options.size)
    print(f"accuracy {before['accuracy']:.1%} -> {after['accuracy']:.1%}")
    is_same = show_answers(exported, before["answers"], after["answers"])
    _say("5. The curve")
    draw(run)
    result = {
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
        "seconds": round(time.perf_counter() - began, 1),
        "export": str(exported),
        "seed": options.seed,
        "same_answers": is_same,
    }
    print(json.dumps(result))
    return 0 if is_same else 1


def judge(model: Path, size: int) -> dict[str, Any]:
    """Let the rwkv package, in a process of its own, answer the held-out problems."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.json"
        command = [sys.executable, str(CLIENT), str(model), "--task", TASK, "--size", str(size), "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def rwkv(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line of this project."""
    return subprocess.run([sys.executable, "-m", "rwkv_es", *arguments], check=True, text=True, **options)


def show_answers(model: Path, before: list[dict], after: list[dict]) -> bool:
    """Show some answers before and after. Returns whether this engine gives the same ones as the rwkv package."""
    pairs = sorted(zip(before, after), key=lambda pair: pair[0]["reward"] - pair[1]["reward"])[:NUM_SHOWN]
    num_same = 0
    for old, new in pairs:
        ours = rwkv("generate", new["prompt"], "--model", str(model), "--task", TASK, stdout=subprocess.PIPE).stdout
        is_same = ours.removesuffix("\n") == new["text"]
        num_same += is_same
        print(f"\n{new['prompt']}")
        print(f"  before, reward {old['reward']:g}:  {_indented(old['text'])}")
        print(f"  after, reward {new['reward']:g}:   {_indented(new['text'])}")
        print(f"  rwkv-es generate gives {'the same answer' if is_same else f'ANOTHER answer: {_indented(ours)}'}")
    return num_same == len(pairs)


def draw(run: Path) -> None:
    """Draw the curves in the terminal and write the report."""
    metrics = read_metrics(run)
    for title, name in (("mean reward of the members", "reward_mean"), ("held-out accuracy", "eval/accuracy")):
        print(f"\n{title}, step by step\n{curve(series(metrics, name))}")
    print(f"\nreport: {write_report(run)}")


def _is_cleared(run: Path) -> bool:
    """Make an empty folder in place of what an earlier demo has left; leave anybody else's run alone."""
    if run.exists() and not (run / MARK).exists():
        print(f"demo: {run} is not from a demo; move it away, or choose another --seed", file=sys.stderr)
        return False
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    (run / MARK).touch()
    return True


def _indented(text: str) -> str:
    return text.strip("\n").replace("\n", "\n" + " " * 21)


def _say(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=300, help="held-out problems that the rwkv package judges on")
    return parser.parse_known_args()


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as failed:
        print(f"demo: stopped, since this failed: {' '.join(failed.cmd)}", file=sys.stderr)
        sys.exit(failed.returncode)
    except KeyboardInterrupt:
        sys.exit(130)
