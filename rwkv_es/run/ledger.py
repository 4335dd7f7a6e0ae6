"""The run folder: append-only steps and what else is noted, the point where a run continues.

config.yaml            resolved options; under `made_with`: versions and the base checkpoint's sha256
ledger.jsonl           one sealed line a step, flushed to the disk: what the weights are a function of
metrics.jsonl          scalars; `step` counts the steps taken, `time` is the clock's, `elapsed_s` leaves pauses out
samples.jsonl          readable prompts, answers, rewards
snapshots              see snapshots.py
"""

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_es.config.options import PROVENANCE, model_name
from rwkv_es.es.step import Step
from rwkv_es.run import made
from rwkv_es.run.identity import BEST_SINCE, check_same_run, config_text, made_by_a_run, provenance, read_config
from rwkv_es.run.record import in_memory, sealed, stream
from rwkv_es.run.snapshots import (
    Best,
    Snapshot,
    best,
    drop_snapshots,
    forget_best,
    is_whole,
    latest_snapshot,
    named_best,
    prune,
    save_snapshot,
    snapshot_steps,
)
from rwkv_es.system import files
from rwkv_es.system.errors import ConfigError
from rwkv_es.system.lock import Lock

if TYPE_CHECKING:
    from rwkv_es.pretrained.checkpoint import Params

HELD_OUT = "held out"  # samples of this kind come with the metrics of an evaluation, and are written before them
_OUTPUTS = ("config.yaml", "ledger.jsonl", "metrics.jsonl", "samples.jsonl", "report.html", "snapshots", "tensorboard")


class Ledger:
    """An open run folder, held by one process at a time. Made by `Ledger.open`; use it as a context manager."""

    def __init__(self, folder: Path, keep: int, lock: Lock) -> None:
        self.folder, self.keep, self._lock = folder, keep, lock
        self.steps: list[Step] = []  # without their rewards, which nobody asks for again
        self.num_without_signal = 0  # of the steps
        self.num_in_a_row_without_signal = 0  # of the last steps
        self.changed: list[str] = []  # contents that are no longer what the run began with
        self._seal = ""
        self._began = time.monotonic()  # as if nothing had come between the processes of the run

    @classmethod
    def open(
        cls, folder: Path, options: Mapping[str, Any], base: Path, contents: Mapping[str, str] | None = None
    ) -> "Ledger":
        """Start a run from the checkpoint `base` in the folder, or continue the one that is there.

        contents: what else to note of it, as digests of what it learns from, see `identity.contents`.

        Raises:
            ConfigError: another process holds the folder, it holds a run with different options (or any run, if
                options["resume"] is "never"), a line in the middle of a file is broken, or it cannot be written.
        """
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            ledger = cls(folder, options["keep"], Lock(folder))
        try:
            _refuse_strangers(folder, default_export(folder, base))
            ledger._begin(options, {**provenance(base), **(contents or {})})
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
        self._lock.release()

    @property
    def next_step(self) -> int:
        """The number of steps taken, which is the number of the next one."""
        return len(self.steps)

    def append(self, step: Step) -> None:
        """Write a step; it is on the disk when this returns."""
        assert step.step == self.next_step, f"step {step.step} after {self.next_step} steps"
        self._lock.check()
        row = sealed(self._seal, step)
        files.append(self.folder / "ledger.jsonl", [row], flush=True)
        self._note(step, row["seal"])

    def write_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a line of scalars, with the time and the seconds that the run has been worked on."""
        when = {"time": round(time.time(), 3), "elapsed_s": round(time.monotonic() - self._began, 3)}
        files.append(self.folder / "metrics.jsonl", [{"step": step, **when, **metrics}])

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write readable answers."""
        files.append(self.folder / "samples.jsonl", [{"step": step, **sample} for sample in samples])

    def save_snapshot(
        self, step: int, params: "Params", optimizer: Mapping[str, Any], best_score: float | None = None
    ) -> None:
        """Save the weights after `step` steps, see `snapshots.save_snapshot`."""
        self._lock.check()
        save_snapshot(self.folder, Snapshot(step, params, dict(optimizer)), self.keep, best_score)

    def prune(self) -> None:
        """Remove what a crash between a snapshot and its pruning has left; the best has to be written down by then."""
        with files.writing(self.folder):
            prune(self.folder, self.keep)

    def latest_snapshot(self) -> Snapshot | None:
        """Return the newest snapshot that is whole and has the weights that the ledger speaks of.

        Where the best one is damaged, it is one before that, so that the best weights are built again on the way.
        """
        checksums = {step.step + 1: step.checksum for step in self.steps}
        lost = self.lost_best()
        return latest_snapshot(self.folder, math.inf if lost is None else lost - 1, checksums)

    def lost_best(self) -> int | None:
        """Return the step of the best snapshot where that is damaged, or gone."""
        named = named_best(self.folder)
        if named is None or not 0 < named.step <= self.next_step or is_whole(self.folder, named.step):
            return None
        return named.step

    def restore_best(self, params: "Params", optimizer: Mapping[str, Any], step: int) -> None:
        """Write a damaged best snapshot anew."""
        named = named_best(self.folder)
        assert named is not None and named.step == step
        self.save_snapshot(step, params, optimizer, named.score)

    def has_snapshot(self, step: int) -> bool:
        """Say whether there is a whole snapshot of the weights after `step` steps."""
        return is_whole(self.folder, step)

    def held_out(self, step: int) -> float | None:
        """Return the held-out score noted for the weights after `step` steps."""
        return held_out(self.folder, step)

    def best(self) -> Best | None:
        """Return the best weights' step and score."""
        return best_weights(self.folder)

    def num_evaluations_since_best(self) -> int:
        """Return how many held-out evaluations there were after the best one."""
        rows, since = read_metrics(self.folder), best_since(self.folder)
        scores = list({r["step"]: r["eval/reward"] for r in rows if "eval/reward" in r and r["step"] >= since}.values())
        return len(scores) - 1 - scores.index(max(scores)) if scores else 0

    def is_best(self, score: float) -> bool:
        """Say whether a held-out score is above that of every snapshot so far, and of the weights before training."""
        known = self.best()
        return math.isfinite(score) and (known is None or score > known.score)

    def _begin(self, options: Mapping[str, Any], made_with: Mapping[str, str]) -> None:
        path = self.folder / "ledger.jsonl"
        if options["resume"] == "never" and path.exists():
            raise ConfigError(f"{self.folder} holds a run; choose another --run, or continue it with --resume auto")
        if not path.exists() and snapshot_steps(self.folder):
            raise ConfigError(f"{self.folder} has snapshots but no ledger.jsonl; restore it, or choose another --run")
        end = 0
        for line in stream(path):
            self._note(line.step, line.seal)
            end = line.end
        if self.steps or snapshot_steps(self.folder):
            made_with, self.changed = check_same_run(self.folder, options, made_with, self.next_step)
        with files.writing(self.folder):
            if not (self.folder / "config.yaml").exists():  # first of all: it says that this is a run's folder
                files.replace(self.folder / "config.yaml", config_text(options, made_with))
                made.begin(self.folder)
            path.touch()
            if path.stat().st_size > end:  # what a crash has torn
                os.truncate(path, end)
            (self.folder / "snapshots").mkdir(exist_ok=True)
            self._drop_untaken()
            if self.changed:
                forget_best(self.folder)
            files.replace(self.folder / "config.yaml", config_text(options, made_with))

    def _note(self, step: Step, seal: str) -> None:
        self.steps.append(in_memory(step))
        is_still = step.fitness[::2] == step.fitness[1::2]  # mirrored members alike: they cancel
        self.num_without_signal += is_still
        self.num_in_a_row_without_signal = self.num_in_a_row_without_signal + 1 if is_still else 0
        self._seal = seal

    def _drop_untaken(self) -> None:
        """Remove what is there of steps that will be taken again, or was left half done."""
        drop_snapshots(self.folder, self.next_step)
        files.keep_lines_(self.folder / "metrics.jsonl", self._is_kept)
        rows = read_metrics(self.folder)
        evaluated = {row.get("step") for row in rows if "eval/reward" in row}
        files.keep_lines_(
            self.folder / "samples.jsonl",
            lambda row: self._is_kept(row) and (row.get("kind") != HELD_OUT or row.get("step") in evaluated),
        )
        self._began -= max((row.get("elapsed_s", 0.0) for row in rows), default=0.0)

    def _is_kept(self, row: Mapping[str, Any]) -> bool:
        """Say whether a line belongs to a step that is taken; an evaluation of changed problems is made again."""
        step = row.get("step", 0)
        if not files.is_count(step):
            return True  # a damaged line
        return 0 < self.next_step >= step and not (
            self.changed and step == self.next_step and {"eval/reward", "held_out_reward"} & row.keys()
        )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read a run's finite scalars, under today's names: those of an evaluation once began with held_out_."""
    rows = files.read_sound_lines(folder / "metrics.jsonl")
    return [
        {re.sub("^held_out_", "eval/", name): value for name, value in row.items() if files.is_finite(value)}
        for row in rows
        if files.is_count(row.get("step", 0))
    ]


def held_out(folder: Path, step: int) -> float | None:
    """Return the held-out score that a run folder has noted for the weights after `step` steps."""
    rows = read_metrics(folder)
    scores = [row["eval/reward"] for row in rows if row.get("step") == step and "eval/reward" in row]
    return scores[-1] if scores else None


def best_since(folder: Path) -> int:
    """Return the step from which on held-out scores are of the same problems and reward."""
    return int(read_config(folder)[PROVENANCE].get(BEST_SINCE, 0))


def best_weights(folder: Path) -> Best | None:
    """Return which weights answered held-out problems best: a snapshot's, or those before training (step 0)."""
    before, found = held_out(folder, 0) if best_since(folder) == 0 else None, best(folder) or _best_noted(folder)
    if before is not None and (found is None or found.score <= before):
        return Best(0, before)
    return found


def _best_noted(folder: Path) -> Best | None:
    """Return the best of the snapshots by the metrics, where the note of the best is there but damaged."""
    if named_best(folder) is not None or not (folder / "snapshots" / "best.json").exists():
        return None
    scores = {step: held_out(folder, step) for step in snapshot_steps(folder) if step >= best_since(folder)}
    known = [Best(step, score) for step, score in scores.items() if score is not None]
    return max(known, key=lambda found: found.score, default=None)


def default_export(run: Path, base: Path) -> Path:
    """Return where a run's weights go: under the base's own name (some servers read it) in the run's folder.

    Raises:
        ConfigError: that is the base itself.
    """
    out = run / f"{model_name(base)}.pth"
    if out.resolve() == base.resolve():
        raise ConfigError(f"the run's weights would replace the base {base}; choose another --run than its folder")
    return out


def _refuse_strangers(folder: Path, exported: Path) -> None:
    """Refuse to start a run among files that no run has made: they would be replaced."""
    if made_by_a_run(folder):
        return
    beside = (exported, *(exported.with_name(exported.stem + end) for end in (".tokenizer.json", "-state.pth")))
    if there := [path.name for path in (*(folder / name for name in _OUTPUTS), *beside) if os.path.lexists(path)]:
        raise ConfigError(
            f"{folder} holds {', '.join(there)}, which no run has made and a run would replace; choose another --run"
        )
