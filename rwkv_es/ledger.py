"""The run folder: append-only steps, atomic snapshots, the point where a run continues.

config.yaml            resolved options; under `made_with`: versions and the base checkpoint's sha256
ledger.jsonl           one line a step, flushed to the disk: what the weights are a function of
metrics.jsonl          scalars; `step` counts the steps taken
samples.jsonl          readable prompts, answers, rewards
snapshots/step-000010  model.pth, optimizer.pt, meta.json: the weights after 10 steps
snapshots/best.json    which snapshot answered held-out problems best, and its score
"""

import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from rwkv_es import __version__, checkpoint, durable
from rwkv_es.config import PROVENANCE
from rwkv_es.errors import CheckpointError, ConfigError

# Options that may differ when a run continues: they change what is watched or how fast, never the weights.
_FREE = {"steps", "run", "resume", "threads", "keep", "snapshot_every", "reward_workers", "eval_every", "eval_size"}


class Step(NamedTuple):
    """One training step, as exact as it was computed."""

    step: int  # from 0
    rewards: list[list[float | None]]  # (N,P), None: missing
    fitness: list[float]  # (N,)
    tokens: int
    seconds: float
    checksum: str  # of the weights after the step


class Snapshot(NamedTuple):
    """The weights after `step` steps, and what the optimiser remembered."""

    step: int
    params: checkpoint.Params
    optimizer: dict[str, Any]


class Best(NamedTuple):
    """The snapshot that answered held-out problems best."""

    step: int
    score: float


class Ledger:
    """An open run folder, held by one process at a time. Made by `Ledger.open`; use it as a context manager."""

    def __init__(self, folder: Path, keep: int, lock: int) -> None:
        self.folder, self.keep, self._lock = folder, keep, lock
        self.steps: list[Step] = []

    @classmethod
    def open(cls, folder: Path, options: Mapping[str, Any], base: Path) -> "Ledger":
        """Start a run from the checkpoint `base` in the folder, or continue the one that is there.

        Raises:
            ConfigError: another process holds the folder, it holds a run with other options (or any run, where
                options["resume"] is "never"), a line in the middle of a file is broken, or it cannot be written.
        """
        with durable.writing(folder):
            (folder / "snapshots").mkdir(parents=True, exist_ok=True)
            ledger = cls(folder, options["keep"], durable.lock(folder))
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
        durable.append(self.folder / "ledger.jsonl", [step._asdict()], flush=True)
        self.steps.append(step)

    def write_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a line of scalars."""
        durable.append(self.folder / "metrics.jsonl", [{"step": step, **metrics}])

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write readable answers."""
        durable.append(self.folder / "samples.jsonl", [{"step": step, **sample} for sample in samples])

    def save_snapshot(
        self, step: int, params: checkpoint.Params, optimizer: Mapping[str, Any], best_score: float | None = None
    ) -> None:
        """Save the weights after `step` steps, whole or not at all; then prune to `keep` besides the best.

        `best_score` is given where these are the best weights so far.

        Raises:
            ConfigError, CheckpointError: the files cannot be written.
        """
        target = _snapshot_folder(self.folder, step)
        partial = target.with_name(f".partial-{step}")
        with durable.writing(target):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            checkpoint.save(partial / "model.pth", params)
            _save_optimizer(partial / "optimizer.pt", dict(optimizer))
            durable.replace(partial / "meta.json", durable.line({"step": step, "rwkv_es": __version__}))
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            durable.sync(target.parent)
            if best_score is not None:
                durable.replace(target.with_name("best.json"), durable.line({"step": step, "score": best_score}))
            self._prune()

    def latest_snapshot(self) -> Snapshot | None:
        """Return the newest readable snapshot."""
        return latest_snapshot(self.folder)

    def best(self) -> Best | None:
        """Return the best snapshot's step and score."""
        return best(self.folder)

    def is_best(self, score: float) -> bool:
        """Say whether a held-out score is above that of every snapshot so far."""
        known = self.best()
        return math.isfinite(score) and (known is None or score > known.score)

    def _begin_(self, options: Mapping[str, Any], made_with: Mapping[str, str]) -> None:
        path = self.folder / "ledger.jsonl"
        if options["resume"] == "never" and path.exists():
            raise ConfigError(f"{self.folder} holds a run; choose another --run, or continue it with --resume auto")
        if not path.exists() and snapshot_steps(self.folder):
            raise ConfigError(f"{self.folder} has snapshots but no ledger.jsonl; restore it, or choose another --run")
        steps = [_read_step(path, number, row) for number, row in enumerate(durable.recover_lines_(path))]
        if steps or snapshot_steps(self.folder):
            _check_same_run(self.folder, options, made_with)
        self.steps = steps
        with durable.writing(self.folder):
            self._drop_untaken_()
            path.touch()
            durable.replace(self.folder / "config.yaml", _config_text(options, made_with))

    def _drop_untaken_(self) -> None:
        """Remove what is there of steps that will be taken again, or was left half done."""
        for partial in self.folder.glob("snapshots/.partial-*"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        for step in snapshot_steps(self.folder):
            if step > self.next_step:
                shutil.rmtree(_snapshot_folder(self.folder, step))
        for path in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):
            rows = durable.recover_lines_(path)
            kept = [row for row in rows if self.next_step and row.get("step", 0) <= self.next_step]
            if len(kept) < len(rows):
                durable.replace(path, "".join(map(durable.line, kept)))

    def _prune(self) -> None:
        known = self.best()
        others = [step for step in snapshot_steps(self.folder) if known is None or step != known.step]
        for step in others[: -self.keep]:
            shutil.rmtree(_snapshot_folder(self.folder, step))


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


def snapshot_steps(folder: Path) -> list[int]:
    """Return the steps of a run folder's snapshots, oldest first."""
    numbers = [path.name.removeprefix("step-") for path in folder.glob("snapshots/step-*")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def latest_snapshot(folder: Path) -> Snapshot | None:
    """Read the newest snapshot that is readable; damaged ones are passed over with a warning."""
    for step in reversed(snapshot_steps(folder)):
        try:
            return read_snapshot(folder, step)
        except CheckpointError as error:
            print(f"rwkv-es: a damaged snapshot is passed over: {error}", file=sys.stderr)
    return None


def best(folder: Path) -> Best | None:
    """Return which snapshot best.json names, if it is there."""
    try:
        named = json.loads((folder / "snapshots" / "best.json").read_bytes())
        found = Best(int(named["step"]), float(named["score"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if found.step in snapshot_steps(folder) else None


def read_snapshot(folder: Path, step: int) -> Snapshot:
    """Read the snapshot of the weights after `step` steps.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    path = _snapshot_folder(folder, step)
    params, _ = checkpoint.load(path / "model.pth")
    try:
        return Snapshot(step, params, torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"))
    except Exception as error:  # noqa: BLE001 - torch.load has no common error for damaged files
        raise CheckpointError(f"{path / 'optimizer.pt'} cannot be read ({type(error).__name__})") from None


def _snapshot_folder(folder: Path, step: int) -> Path:
    return folder / "snapshots" / f"step-{step:06d}"


def _save_optimizer(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(str(error).splitlines()[0]) from None
        file.flush()
        os.fsync(file.fileno())


def _check_same_run(folder: Path, options: Mapping[str, Any], made_with: Mapping[str, str]) -> None:
    """Refuse to continue a run whose weights would have become others."""
    old = read_config(folder)
    before = {**old, "base_sha256": old[PROVENANCE].get("base_sha256")}
    now = {**options, "base_sha256": made_with["base_sha256"]}
    names = [name for name in {**now, **before} if name not in (_FREE | {PROVENANCE})]
    if options["schedule"] != "constant":
        names.append("steps")  # the learning rate of the steps already taken depends on it
    changes = [
        f"{name} {before.get(name, 'unset')} (now {now.get(name, 'unset')})"
        for name in names
        if before.get(name, "unset") != now.get(name, "unset")
    ]
    if changes:
        raise ConfigError(f"{folder} holds a run with {', '.join(changes)}; choose another --run, or give its options")


def _config_text(options: Mapping[str, Any], made_with: Mapping[str, str]) -> str:
    return yaml.safe_dump({**options, PROVENANCE: dict(made_with)}, sort_keys=False, allow_unicode=True)


def _read_step(path: Path, number: int, row: dict[str, Any]) -> Step:
    try:
        step = Step(**row)
    except TypeError:
        step = None
    if step is None or step.step != number:
        raise ConfigError(f"{path} line {number + 1} is not step {number}; restore the file, or choose another --run")
    return step
