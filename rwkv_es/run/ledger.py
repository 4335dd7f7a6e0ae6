"""The run folder: append-only steps and what else is noted, the point where a run continues.

config.yaml            resolved options; under `made_with`: versions and the base checkpoint's sha256
ledger.jsonl           one sealed line a step, flushed to the disk: what the weights are a function of
metrics.jsonl          scalars; `step` counts the steps taken
samples.jsonl          readable prompts, answers, rewards
snapshots              see snapshots.py
"""

import hashlib
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from rwkv_es import __version__, files
from rwkv_es.config.options import FIELDS, PROVENANCE
from rwkv_es.errors import ConfigError
from rwkv_es.es.strategy import Step
from rwkv_es.model import checkpoint
from rwkv_es.run.snapshots import Best, Snapshot, best, drop_snapshots, latest_snapshot, save_snapshot, snapshot_steps

# Options that may differ when a run continues: they change what is watched or how fast, never the weights.
_FREE = {name for name, f in FIELDS.items() if f.metadata["on_resume"] == "free"}
# What the weights of past steps are a function of, besides the base and the ledger: a fork may change all others.
_LASTING = {name for name, f in FIELDS.items() if f.metadata["on_resume"] == "same"} | {"base_sha256"}
FORKED_AT = "forked_at"  # key under PROVENANCE: how many steps a fork has taken over


class Ledger:
    """An open run folder, held by one process at a time. Made by `Ledger.open`; use it as a context manager."""

    def __init__(self, folder: Path, keep: int, lock: int) -> None:
        self.folder, self.keep, self._lock = folder, keep, lock
        self.steps: list[Step] = []
        self._seal = ""

    @classmethod
    def open(cls, folder: Path, options: Mapping[str, Any], base: Path) -> "Ledger":
        """Start a run from the checkpoint `base` in the folder, or continue the one that is there.

        Raises:
            ConfigError: another process holds the folder, it holds a run with different options (or any run, if
                options["resume"] is "never"), a line in the middle of a file is broken, or it cannot be written.
        """
        with files.writing(folder):
            (folder / "snapshots").mkdir(parents=True, exist_ok=True)
            ledger = cls(folder, options["keep"], files.lock(folder))
        try:
            ledger._begin_(options, provenance(base))
        except BaseException:
            ledger.close()
            raise
        return ledger

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def next_step(self) -> int:
        """The number of steps taken, which is the number of the next one."""
        return len(self.steps)

    def append(self, step: Step) -> None:
        """Write a step; it is on the disk when this returns."""
        assert step.step == self.next_step, f"step {step.step} after {self.next_step} steps"
        row = sealed(self._seal, step)
        files.append(self.folder / "ledger.jsonl", [row], flush=True)
        self.steps.append(step)
        self._seal = row["seal"]

    def write_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a line of scalars."""
        files.append(self.folder / "metrics.jsonl", [{"step": step, **metrics}])

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write readable answers."""
        files.append(self.folder / "samples.jsonl", [{"step": step, **sample} for sample in samples])

    def save_snapshot(
        self, step: int, params: checkpoint.Params, optimizer: Mapping[str, Any], best_score: float | None = None
    ) -> None:
        """Save the weights after `step` steps, see `snapshots.save_snapshot`."""
        save_snapshot(self.folder, Snapshot(step, params, dict(optimizer)), self.keep, best_score)

    def latest_snapshot(self) -> Snapshot | None:
        """Return the newest readable snapshot."""
        return latest_snapshot(self.folder)

    def has_snapshot(self, step: int) -> bool:
        """Say whether there is a snapshot of the weights after `step` steps."""
        return step in snapshot_steps(self.folder)

    def held_out(self, step: int) -> float | None:
        """Return the held-out score noted for the weights after `step` steps."""
        return held_out(self.folder, step)

    def best(self) -> Best | None:
        """Return the best weights' step and score."""
        return best_weights(self.folder)

    def num_evaluations_since_best(self) -> int:
        """Return how many held-out evaluations there were after the best one."""
        rows, _ = files.read_lines(self.folder / "metrics.jsonl")
        scores = list({r["step"]: r["held_out_reward"] for r in rows if "held_out_reward" in r}.values())
        return len(scores) - 1 - scores.index(max(scores)) if scores else 0

    def is_best(self, score: float) -> bool:
        """Say whether a held-out score is above that of every snapshot so far, and of the weights before training."""
        known = self.best()
        return math.isfinite(score) and (known is None or score > known.score)

    def _begin_(self, options: Mapping[str, Any], made_with: Mapping[str, str]) -> None:
        path = self.folder / "ledger.jsonl"
        if options["resume"] == "never" and path.exists():
            raise ConfigError(f"{self.folder} holds a run; choose another --run, or continue it with --resume auto")
        if not path.exists() and snapshot_steps(self.folder):
            raise ConfigError(f"{self.folder} has snapshots but no ledger.jsonl; restore it, or choose another --run")
        rows = files.recover_lines_(path)
        self.steps = [step for step, _ in unsealed(path, rows)]
        self._seal = rows[-1]["seal"] if rows else ""
        if self.steps or snapshot_steps(self.folder):
            made_with = _check_same_run(self.folder, options, made_with, self.next_step)
        with files.writing(self.folder):
            self._drop_untaken_()
            path.touch()
            files.replace(self.folder / "config.yaml", config_text(options, made_with))

    def _drop_untaken_(self) -> None:
        """Remove what is there of steps that will be taken again, or was left half done."""
        drop_snapshots(self.folder, self.next_step)
        for path in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):
            rows = files.recover_lines_(path)
            kept = [row for row in rows if self.next_step and row.get("step", 0) <= self.next_step]
            if len(kept) < len(rows):
                files.replace(path, "".join(map(files.line, kept)))


def held_out(folder: Path, step: int) -> float | None:
    """Return the held-out score that a run folder has noted for the weights after `step` steps."""
    rows, _ = files.read_lines(folder / "metrics.jsonl")
    scores = [row["held_out_reward"] for row in rows if row.get("step") == step and "held_out_reward" in row]
    return scores[-1] if scores else None


def best_weights(folder: Path) -> Best | None:
    """Return which weights answered held-out problems best: a snapshot's, or those before training (step 0)."""
    before, found = held_out(folder, 0), best(folder)
    if before is not None and (found is None or found.score <= before):
        return Best(0, before)
    return found


def sealed(seal_before: str, step: Step) -> dict[str, Any]:
    """Return a step's row with its seal: a hash of the row and of all rows before it."""
    row = step._asdict()
    return {**row, "seal": _seal(seal_before, row)}


def chained(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Return the rows of a whole ledger."""
    rows: list[dict[str, Any]] = []
    for step in steps:
        rows.append(sealed(rows[-1]["seal"] if rows else "", step))
    return rows


def unsealed(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Step, str]]:
    """Return the steps in a ledger's rows, each with its seal.

    Raises:
        ConfigError: a row is not the one that was written; it is named.
    """
    steps: list[tuple[Step, str]] = []
    texts = path.read_bytes().split(b"\n") if rows else []
    for number, row in enumerate(rows):
        fields = {name: value for name, value in row.items() if name != "seal"}
        seal = _seal(steps[-1][1] if steps else "", fields)
        if set(fields) != set(Step._fields) or fields["step"] != number:
            raise ConfigError(
                f"{path} line {number + 1} is not step {number}; restore the file, or choose another --run"
            )
        if seal != row.get("seal") or files.line(row).encode() != texts[number] + b"\n":
            raise ConfigError(
                f"{path} line {number + 1} (step {number}) is not what was written: its seal is broken; "
                "restore the file, or choose another --run"
            )
        steps.append((Step(**fields), seal))
    return steps


def read_steps(folder: Path) -> list[Step]:
    """Read a run folder's steps; nothing is changed there.

    Raises:
        ConfigError: a line is broken, even the last one, or is not the one that was written.
    """
    path = folder / "ledger.jsonl"
    rows, num_bytes = files.read_lines(path)
    if path.exists() and path.stat().st_size > num_bytes:
        raise ConfigError(
            f"{path} line {len(rows) + 1} is torn or damaged; rwkv-es train drops it and takes that step again"
        )
    return [step for step, _ in unsealed(path, rows)]


def read_config(folder: Path) -> dict[str, Any]:
    """Read a run folder's config.yaml: the options, and under `made_with` the provenance.

    Raises:
        ConfigError: the folder holds no run, or the file is damaged.
    """
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {**values, PROVENANCE: dict(values[PROVENANCE])}
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder} holds no run (no config.yaml); name the folder of a training run") from None
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        raise ConfigError(f"{path} is damaged; restore it, or choose another --run") from None


def provenance(base: Path) -> dict[str, str]:
    """Return what a run is made with: versions, the base checkpoint's path and sha256."""
    return {
        "rwkv_es": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
        "base": str(base.resolve()),
        "base_sha256": checkpoint.sha256(base),
    }


def _check_same_run(
    folder: Path, options: Mapping[str, Any], made_with: Mapping[str, Any], next_step: int
) -> Mapping[str, Any]:
    """Refuse to continue a run whose weights would have become different. Returns what to note as its provenance."""
    old = read_config(folder)
    before = {**old, "base_sha256": old[PROVENANCE].get("base_sha256")}
    now = {**options, "base_sha256": made_with["base_sha256"]}
    names = [name for name in {**now, **before} if name not in (_FREE | {PROVENANCE})]
    if options["schedule"] != "constant":
        names.append("steps")  # the learning rate of the steps already taken depends on it
    if (forked_at := old[PROVENANCE].get(FORKED_AT)) is not None:
        made_with = {**made_with, FORKED_AT: forked_at}
        names = [name for name in names if name in _LASTING or next_step > forked_at]
    changes = [
        f"{name} {before.get(name, 'unset')} (now {now.get(name, 'unset')})"
        for name in names
        if before.get(name, "unset") != now.get(name, "unset")
    ]
    if changes:
        raise ConfigError(f"{folder} holds a run with {', '.join(changes)}; choose another --run, or give its options")
    return made_with


def config_text(options: Mapping[str, Any], made_with: Mapping[str, Any]) -> str:
    """Return what config.yaml holds."""
    return yaml.safe_dump({**options, PROVENANCE: dict(made_with)}, sort_keys=False, allow_unicode=True)


def _seal(seal_before: str, row: Mapping[str, Any]) -> str:
    return hashlib.sha256((seal_before + files.line(row)).encode()).hexdigest()[:16]
