"""Compare our ES with what people use: the same warm start, the same budget, the same small sweep, then seeds.

    python scripts/compare.py --budget cpu-seconds --amount 15 --out runs/compare
    python scripts/compare.py --budget generations --amount 600 --tried 1 --seeds 1 --judge 40 --out runs/short
    python scripts/compare.py --budget bytes --amount 8 --length 256 --out runs/bytes
    python scripts/compare.py --out runs/compare --only-tables

A sweep tries every method's settings (its `GRID`) once, judged on training problems that nobody trains on; the best
goes on to the seeds, judged on held-out problems. All records go to records.jsonl; a start with the same folder goes on
from there. Tables (tables.md) and curves (*.svg) are made from it. Needs the extra `compare`; a run takes one core.
With `--budget bytes` nothing is learned: counted are the answers of --length tokens that each method has in flight in
the memory of GRPO with --amount of them in one pass (bytes.md).
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare import bytes as equal_bytes
from compare.methods import METHODS
from compare.race import CONTROLS, NUM_POINTS, SWEEP_SEED, Entry, in_child, run
from compare.records import Record, best_settings, is_done, read_records
from compare.tables import tables
from compare.world import World, open_world

BUDGETS = ("cpu-seconds", "generations", "bytes")


@dataclass(frozen=True)
class Phase:
    """A pass over entries: which problems judge them."""

    name: str  # "sweep", "final"
    problems: str  # "tune", "test"
    thrift: int  # what the number of problems is divided by


SWEEP, FINAL = Phase("sweep", "tune", 2), Phase("final", "test", 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are not there yet, then tables and curves."""
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if options.budget == "bytes":
        world = open_world(options.model, options.tasks[0])
        text = equal_bytes.compare(world, int(options.amount), options.length, options.methods)
        (options.out / "bytes.md").write_text(text + "\n", encoding="utf-8")
        print(text)
        return 0
    for task in () if options.only_tables else options.tasks:
        compare(open_world(options.model, task), task, options)
    print(tables(options.out, options.level))
    return 0


def compare(world: World, task: str, options: argparse.Namespace) -> None:
    """Sweep every method, then run the best settings with every seed: a seed of all methods after the other."""
    given = options.settings
    for entry in sweep_entries(options) if given is None else ():
        make(world, task, SWEEP, entry, options)
    for seed in range(options.seeds):
        for method in options.methods:
            settings = best_settings(read_records(options.out), task, method) if given is None else given
            entry = Entry(method, settings, seed, options.budget, options.amount, options.control, options.points)
            make(world, task, FINAL, entry, options)


def sweep_entries(options: argparse.Namespace) -> Iterator[Entry]:
    """Yield all methods' settings."""
    for method in options.methods:
        for settings in options.grid or METHODS[method].GRID[: options.tried]:
            yield Entry(method, settings, SWEEP_SEED, options.budget, options.amount * options.share)


def make(world: World, task: str, phase: Phase, entry: Entry, options: argparse.Namespace) -> None:
    """Make one run in a process of its own, unless its records are there; append them."""
    head = {"task": task, "phase": phase.name, **entry._asdict()}
    if is_done(read_records(options.out), head):
        return
    problems = getattr(world, phase.problems)[: options.judge // phase.thrift]
    records = in_child(lambda: run(world, entry, problems))
    append(options.out, [{**head, **record, "is_last": record is records[-1]} for record in records])
    last = records[-1]
    print(
        f"{task} {phase.name} {entry.method} {json.dumps(entry.settings)} seed {entry.seed} {entry.control}: "
        f"{records[0]['accuracy']:.1%} -> {last['accuracy']:.1%} in {last['cpu_s']:.1f} s and "
        f"{last['generations']} answers",
        flush=True,
    )


def append(folder: Path, records: Sequence[Record]) -> None:
    """Append records."""
    with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, default: Any, meaning: str, **others: Any) -> None:
        parser.add_argument(f"--{name}", default=default, help=f"{meaning} (default {default})", **others)

    add("model", "tiny", "the warm start")
    add("tasks", ["countdown_mini", "arithmetic_mini"], "tasks", nargs="+")
    add("methods", list(METHODS), "methods", nargs="+", choices=list(METHODS))
    add("budget", "cpu-seconds", "what is equal", choices=BUDGETS)
    add("amount", 15.0, "how much of it a final run has; of bytes: GRPO's answers in one pass", type=float)
    add("length", 256, "tokens of an answer, with --budget bytes", type=int)
    add("share", 0.5, "share of it that a run of the sweep has", type=float)
    add("tried", 8, "settings of each method in the sweep", type=int)
    add("seeds", 5, "final runs of each method", type=int)
    add("judge", 300, "problems that judge", type=int)
    add("grid", None, "settings to try instead, a JSON list, of the one method named", type=json.loads)
    add("settings", None, "no sweep: these settings, as JSON, of the one method named", type=json.loads)
    add("points", NUM_POINTS, "points of a curve", type=int)
    add("level", 0.5, "accuracy whose cost the tables name", type=float)
    add("control", "none", "what is done to the rewards before they are learned from", choices=CONTROLS)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--only-tables", action="store_true", help="make no run")
    options = parser.parse_args(argv)
    for name in ("settings", "grid"):
        if getattr(options, name) is not None and len(options.methods) > 1:
            parser.error(f"--{name} are those of one method; got --methods {' '.join(options.methods)}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
