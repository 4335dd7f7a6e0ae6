"""Run folders among others: a list of them with sizes, and what may be removed of them."""

import contextlib
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from rwkv_es.config.file import is_run_folder
from rwkv_es.measure.reading import Standing, standing_of
from rwkv_es.run.identity import made_by_a_run
from rwkv_es.run.made import is_unchanged
from rwkv_es.run.snapshots import SNAPSHOT_FILES, best, snapshot_steps
from rwkv_es.system import files
from rwkv_es.system.errors import ConfigError
from rwkv_es.system.lock import holder
from rwkv_es.system.texts import printable, size

_BOOKS = ("config.yaml", "ledger.jsonl", "metrics.jsonl", "samples.jsonl", ".rwkv-es-made.json", ".rwkv-es-lock.json")
_DEEPEST = 3  # folders below the one that is listed
_COLUMNS = ("run", "state", "steps", "best", "size", "last change")


class Found(NamedTuple):
    """A run in a list."""

    standing: Standing
    num_bytes: int
    changed: float  # seconds since 1970


def list_runs(folder: Path) -> str:
    """Return a table of the runs in a folder and below, the newest first.

    Raises:
        ConfigError: there is none.
    """
    runs = sorted(found_in(folder), key=lambda found: found.changed, reverse=True)
    if not runs:
        raise ConfigError(f"there is no run in {folder}; train one, or name a folder: rwkv-es runs FOLDER")
    rows = [_COLUMNS, *map(_row, runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, f"{len(runs)} runs, {size(sum(found.num_bytes for found in runs))}"])


def found_in(folder: Path) -> Iterator[Found]:
    """Yield the runs in a folder and below; those that cannot be read are named on stderr."""
    depth = len(folder.parts)
    for path, subfolders, _ in os.walk(folder):
        place = Path(path)
        if is_run_folder(path):
            subfolders.clear()
            try:
                yield Found(standing_of(place), _total(place.rglob("*")), _changed(place))
            except (ConfigError, OSError) as error:  # a run that changes while it is looked at, say
                print(printable(f"rwkv-es: {error}"), file=sys.stderr)
        elif len(place.parts) - depth >= _DEEPEST:
            subfolders.clear()


def removable(run: Path, is_all: bool) -> list[Path]:
    """Return the files of a run that may go: snapshots but the best (or the last), or all that the run has made.

    Raises:
        ConfigError: it is no run, or a process trains in it.
    """
    if not (is_run_folder(str(run)) and made_by_a_run(run)):
        raise ConfigError(f"{run} is not the folder of a run, so nothing of it is removed")
    if who := holder(run):
        raise ConfigError(f"{who} is training in {run}; wait for it, or stop it first")
    known, steps = best(run), snapshot_steps(run)
    kept = () if is_all else (known.step if known else max(steps, default=0),)
    found = [
        run / "snapshots" / f"step-{step:06d}" / name for step in steps if step not in kept for name in SNAPSHOT_FILES
    ]
    found += [path for path in run.glob("snapshots/.partial-*/*") if path.name in SNAPSHOT_FILES]
    if is_all:
        made = [path for path in run.iterdir() if path.is_file() and is_unchanged(run, path)]
        events = (run / "tensorboard").rglob("events.out.tfevents.*")
        found += [*made, run / "snapshots" / "best.json", *events, *(run / name for name in _BOOKS)]
    here = Path(os.path.realpath(run))  # no file behind a link, nor below a folder that is one: it may be another run's
    return [path for path in dict.fromkeys(found) if path.is_file() and path.resolve() == here / path.relative_to(run)]


def clean(runs: Sequence[Path], is_all: bool, is_sure: bool) -> None:
    """Remove what may go of some runs, once somebody has agreed.

    Raises:
        ConfigError: nobody can be asked, or see `removable`.
    """
    doomed = {run: removable(run, is_all) for run in {os.path.realpath(run): run for run in runs}.values()}
    for run, paths in doomed.items():
        what = "all that the run has made" if is_all else "its snapshots but the best one"
        print(printable(f"{run}: {what}, {len(paths)} files of {size(_total(paths))}"))
    if not any(doomed.values()):
        print("nothing to remove")
        return
    if not is_sure and not _agreed():
        print("nothing was removed")
        return
    for run, paths in doomed.items():
        still = set(removable(run, is_all))  # somebody may have begun to train in it, or changed a file
        with files.writing(run):
            _remove(run, [path for path in paths if path in still])
    print("removed")
    for run in doomed:
        if is_all and run.exists() and (kept := sorted(path.name for path in run.iterdir())):
            print(printable(f"{run} keeps what the run has not made: {', '.join(kept)}"))


def _remove(run: Path, paths: Sequence[Path]) -> None:
    """Remove files, the books last, and folders that are empty then."""
    for path in sorted(paths, key=lambda path: (path.parent == run and path.name in _BOOKS, path)):
        path.unlink(missing_ok=True)
    for parent in sorted({p for path in paths for p in path.parents if run in (p, *p.parents)}, reverse=True):
        if parent.is_dir() and not any(parent.iterdir()):
            parent.resolve().rmdir()  # a run that is called "." too


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("nobody is there to be asked; --yes removes it without a question")
    try:
        return input("remove it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


def _row(found: Found) -> tuple[str, ...]:
    standing = found.standing
    score = f"{standing.best.score:.3f} @ {standing.best.step}" if standing.best else "-"
    when = datetime.fromtimestamp(found.changed).strftime("%Y-%m-%d %H:%M")
    steps = f"{standing.num_steps}/{standing.planned}"
    return (
        printable(str(standing.folder)).replace("\n", "\ufffd"),
        standing.state,
        steps,
        score,
        size(found.num_bytes),
        when,
    )


def _changed(run: Path) -> float:
    return max((run / name).stat().st_mtime for name in ("config.yaml", "ledger.jsonl"))


def _total(paths: Iterator[Path] | Sequence[Path]) -> int:
    found = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # it has just been removed
            status = path.lstat()
            found += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return found
