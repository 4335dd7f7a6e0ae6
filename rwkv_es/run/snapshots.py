"""Snapshots of the weights in a run folder: whole or not there, checked when read, pruned by count.

snapshots/step-000010  model.pth, optimizer.pt, meta.json with their sha256: the weights after 10 steps
snapshots/best.json    which snapshot answered held-out problems best, and its score
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rwkv_es import __version__
from rwkv_es.system import files
from rwkv_es.system.errors import CheckpointError
from rwkv_es.system.streams import waiting

if TYPE_CHECKING:  # torch comes in where weights do: who looks at a run does not wait for it
    from rwkv_es.pretrained.checkpoint import Params

_FILES = ("model.pth", "optimizer.pt")
SNAPSHOT_FILES = (*_FILES, "meta.json")


class Snapshot(NamedTuple):
    """The weights after `step` steps, and what the optimiser remembered."""

    step: int
    params: "Params"
    optimizer: dict[str, Any]


class Best(NamedTuple):
    """The weights that answered held-out problems best."""

    step: int
    score: float


def save_snapshot(folder: Path, snapshot: Snapshot, keep: int, best_score: float | None = None) -> None:
    """Save a snapshot whole or not at all; then prune to `keep` besides the best.

    `best_score` is given if these are the best weights so far.

    Raises:
        ConfigError, CheckpointError: the files cannot be written.
    """
    target = _folder_of(folder, snapshot.step)
    partial = target.with_name(f".partial-{snapshot.step}")
    with waiting(f"snapshot of step {snapshot.step}"), files.writing(target):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with files.whole_or_gone(partial):
            _write(partial, snapshot)
        if target.exists():  # a damaged one
            _remove(target)
        partial.rename(target)
        files.sync(target.parent)
        if best_score is not None:
            note_best(folder, Best(snapshot.step, best_score))
        prune(folder, keep)


def _write(folder: Path, snapshot: Snapshot) -> None:
    from rwkv_es.pretrained import checkpoint

    checkpoint.save(folder / "model.pth", snapshot.params)
    _save_optimizer(folder / "optimizer.pt", snapshot.optimizer)
    sha256 = {name: checkpoint.sha256(folder / name) for name in _FILES}
    meta = {"step": snapshot.step, "rwkv_es": __version__, "sha256": sha256}
    files.replace(folder / "meta.json", files.line({**meta, "seal": _seal(meta)}))


def snapshot_steps(folder: Path) -> list[int]:
    """Return the steps of a run folder's snapshots, oldest first."""
    numbers = [path.name.removeprefix("step-") for path in folder.glob("snapshots/step-*")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def latest_snapshot(
    folder: Path, most: float = math.inf, checksums: Mapping[int, str] | None = None
) -> Snapshot | None:
    """Read the newest snapshot, of at most `most` steps, that is whole; damaged ones are passed over with a warning.

    checksums: of the weights after each step, where they are to be compared.
    """
    from rwkv_es.es.update import checksum

    for step in reversed(snapshot_steps(folder)):
        if step <= most:
            try:
                found = read_snapshot(folder, step)
                if checksums and checksum(found.params) != checksums.get(step):
                    raise CheckpointError(f"{_folder_of(folder, step)} has other weights than the ledger says")
                return found
            except CheckpointError as error:
                print(f"rwkv-es: a damaged snapshot is passed over: {error}", file=sys.stderr)
    return None


def is_whole(folder: Path, step: int) -> bool:
    """Say whether the files of a snapshot are there and as they were written."""
    try:
        _check_files(_folder_of(folder, step), step)
    except CheckpointError:
        return False
    return True


def read_snapshot(folder: Path, step: int) -> Snapshot:
    """Read the snapshot of the weights after `step` steps.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    import torch

    from rwkv_es.pretrained import checkpoint

    path = _folder_of(folder, step)
    _check_files(path, step)
    params, _ = checkpoint.load(path / "model.pth", may_be_int8=True)
    try:
        return Snapshot(step, params, torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"))
    except Exception as error:  # noqa: BLE001 - torch.load has no common error for damaged files
        raise CheckpointError(f"{path / 'optimizer.pt'} cannot be read ({type(error).__name__})") from None


def best(folder: Path) -> Best | None:
    """Return which snapshot best.json names, if it is there."""
    found = named_best(folder)
    return found if found is not None and found.step in snapshot_steps(folder) else None


def named_best(folder: Path) -> Best | None:
    """Return what best.json names, whether it is there or not."""
    try:
        named = json.loads((folder / "snapshots" / "best.json").read_bytes())
        return Best(int(named["step"]), float(named["score"]))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def forget_best(folder: Path) -> None:
    """Let the next held-out evaluation find a new best."""
    (folder / "snapshots" / "best.json").unlink(missing_ok=True)


def note_best(folder: Path, found: Best) -> None:
    """Write down which snapshot is the best so far."""
    files.replace(folder / "snapshots" / "best.json", files.line({"step": found.step, "score": found.score}))


def drop_snapshots(folder: Path, most: int) -> None:
    """Remove what was left half done, and snapshots of more than `most` steps."""
    for partial in folder.glob("snapshots/.partial-*"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    for step in snapshot_steps(folder):
        if step > most:
            _remove(_folder_of(folder, step))


def _remove(path: Path) -> None:
    """Remove a snapshot: gone at once, whatever happens while its files are deleted."""
    doomed = path.with_name(f".partial-{path.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def prune(folder: Path, keep: int) -> None:
    """Remove all snapshots but the best and the last `keep` others."""
    known = best(folder)
    others = [step for step in snapshot_steps(folder) if known is None or step != known.step]
    for step in others[:-keep]:
        _remove(_folder_of(folder, step))


def _folder_of(folder: Path, step: int) -> Path:
    return folder / "snapshots" / f"step-{step:06d}"


def _check_files(path: Path, step: int) -> None:
    from rwkv_es.pretrained import checkpoint

    try:
        meta = json.loads((path / "meta.json").read_bytes())
        changed = [name for name in _FILES if checkpoint.sha256(path / name) != meta["sha256"][name]]
        changed += ["meta.json"] if meta.pop("seal") != _seal(meta) or meta["step"] != step else []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, CheckpointError) as error:
        raise CheckpointError(f"{path} is incomplete or damaged ({type(error).__name__})") from None
    if changed:
        raise CheckpointError(f"{path / changed[0]} is not what was written: its sha256 is different")


def _seal(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(files.line(meta).encode()).hexdigest()[:16]


def _save_optimizer(path: Path, state: dict[str, Any]) -> None:
    import torch

    from rwkv_es.pretrained import checkpoint

    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            raise OSError(checkpoint.reason(error)) from None
        file.flush()
        os.fsync(file.fileno())
