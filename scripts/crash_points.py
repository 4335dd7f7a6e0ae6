"""Kill a training at every single thing that it does to its files; each time it must end as if nothing had happened.

    python scripts/crash_points.py                     every point, about a second each; one line per point that fails
    python scripts/crash_points.py --every 30          some of them
    python scripts/crash_points.py --points 17 --show  one again, with what each start printed
    python scripts/crash_points.py --twice             the start that continues is killed too, at another point

A point is an opening for writing, a renaming, a removal and the like, before which the process kills itself, or a
write, of which half is written. The same command then continues the run. In the end its weights after every step, its
files and their contents have to be those of an undisturbed run, and `rwkv-es replay` has to verify it. Linux only.
"""

import argparse
import builtins
import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # threads would not survive the forks
OPTIONS = (
    "--model tiny --task countdown_mini --population 8 --prompts 2 --max-new-tokens 40 --steps 6 --eval-every 2 "
    "--eval-size 6 --sigma 0.02 --lr 0.02 --targets matrices=1,head.weight=3 --keep 1 --reward-workers 0 "
    "--threads 1 --device cpu --tracker none"
)
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Audit event: places of the path and of the folder that it is relative to, among the event's arguments.
EVENTS = {
    **{"os.remove": (0, 1), "os.rmdir": (0, 1), "os.mkdir": (0, 2), "os.rename": (1, 3), "os.link": (1, 3)},
    **{"os.symlink": (1, 2), "os.truncate": (0, None)},
}
# They hold times, or where the run is.
TIMED = (".rwkv-es-made.json", "config.yaml", "ledger.jsonl", "metrics.jsonl", "report.html")


class Points:
    """Count what this process does to files in a folder, and kill it at one of these points (0: at none)."""

    def __init__(self, folder: Path, deadly: int) -> None:
        self.folder, self.deadly, self.seen = os.path.realpath(folder), deadly, list[str]()

    def reach(self, what: str, path: Any, folder: Any = None) -> bool:
        """Count a point. Returns whether it is the deadly one."""
        inside = self.inside(path, folder)
        if inside is not None:
            self.seen.append(f"{what} {inside}")
        return inside is not None and len(self.seen) == self.deadly

    def inside(self, path: Any, folder: Any = None) -> str | None:
        """Return a path (or open file's number) relative to the folder, None if it is outside."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if isinstance(folder, int) and folder >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
        found = os.path.relpath(os.path.abspath(os.fsdecode(path)), self.folder)
        return None if found.startswith("..") else found

    def watch(self) -> None:
        """Count from now on, as long as this process lives."""
        sys.addaudithook(self._hear)
        builtins.open = io.open = watched_open(self)  # type: ignore[assignment]
        if hasattr(sys.modules["pathlib"], "_NormalAccessor"):  # of Python 3.10
            sys.modules["pathlib"]._NormalAccessor.open = staticmethod(io.open)  # type: ignore[attr-defined]
        torch = sys.modules["torch"]
        torch.save = watched_save(self, torch.save)  # type: ignore[attr-defined]

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        is_deadly = False
        if event == "open" and given[2] & CHANGES:
            is_deadly = self.reach("open", given[0])
        elif event in EVENTS:
            path, folder = EVENTS[event]
            is_deadly = self.reach(event, given[path], None if folder is None else given[folder])
        if is_deadly:
            die()


def watched_open(points: Points) -> Callable[..., Any]:
    """Return `open` with writes that are points."""
    real_open = io.open

    class Torn(io.FileIO):
        def write(self, data: Any) -> int:
            if points.reach("write half of", self.fileno()):
                super().write(memoryview(data).cast("B")[: len(data) // 2])
                die()
            return super().write(data)

    def watched(path: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+") or points.inside(path) is None:
            return real_open(path, mode, buffering, *text, **options)
        raw = Torn(path, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **options)

    return watched


def watched_save(points: Points, real_save: Callable[..., None]) -> Callable[..., None]:
    """Return torch.save with points: torch writes into a path without Python's knowledge."""

    def watched(values: Any, file: Any, *given: Any, **options: Any) -> None:
        is_path = isinstance(file, (str, os.PathLike))
        if is_path and points.reach("torch.save", file):
            die()
        real_save(values, file, *given, **options)
        if is_path and points.reach("torch.save half of", file):
            os.truncate(file, os.path.getsize(file) // 2)
            die()

    return watched


def die() -> None:
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


class State(NamedTuple):
    """What a finished run consists of, without times and places."""

    checksums: list[str]
    evaluations: list[tuple[int, float | None]]  # steps taken, held-out reward
    files: dict[str, str]  # what they hold, as a digest


def state_of(run: Path) -> State:
    """Read a run folder."""
    rows = {name: json_lines(run / name) for name in ("ledger.jsonl", "metrics.jsonl")}
    digests = {
        str(path.relative_to(run)): "" if path.name in TIMED else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file()
    }
    digests |= {f"{path.relative_to(run)}/": "" for path in run.rglob("*") if path.is_dir()}
    evaluations = [(row["step"], row.get("eval/reward")) for row in rows["metrics.jsonl"]]
    return State([row["checksum"] for row in rows["ledger.jsonl"]], evaluations, digests)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; where it is missing there are none."""
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def differences(found: State, expected: State) -> list[str]:
    """Say in what a run differs from the undisturbed one."""
    names = sorted({*found.files, *expected.files})
    more = [name for name in names if name not in expected.files]
    less = [name for name in names if name not in found.files]
    other = [name for name in set(names) - {*more, *less} if found.files[name] != expected.files[name]]
    said = {"left over:": more, "missing:": less, "other contents:": sorted(other)}
    faults = [f"{what} {', '.join(them)}" for what, them in said.items() if them]
    faults += ["other weights"] if found.checksums != expected.checksums else []
    return faults + (["other lines of metrics"] if found.evaluations != expected.evaluations else [])


def command(run: Path, given: argparse.Namespace) -> list[str]:
    """Return the training's command line."""
    return ["train", *OPTIONS.split(), "--snapshot-every", str(given.snapshot_every), "--run", str(run)]


def forked(log: Path, work: Callable[[], int]) -> int:
    """Do something in a copy of this process, which prints to the log. Returns its exit code, -9 if it was killed."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = work()
        sys.stdout.flush()
    finally:
        os._exit(code)  # the child must not go on as its parent would


def killed_at(point: int, argv: list[str], run: Path, seen: Path | None = None) -> int:
    """Run a command line that is killed at a point. Returns its exit code."""
    from rwkv_es.cli import main as rwkv_es

    points = Points(run, point)
    points.watch()
    code = rwkv_es(argv)
    if seen is not None:
        seen.write_text("\n".join(points.seen), encoding="utf-8")
    return code


def continued(argv: list[str], run: Path) -> int:
    """Run a command line to its end, then replay the run. Returns the first exit code that is not 0."""
    from rwkv_es.cli import main as rwkv_es

    return rwkv_es(argv) or rwkv_es(["replay", str(run)])


def faults_at(point: int, folder: Path, given: argparse.Namespace, expected: State) -> list[str]:
    """Kill a training at a point, continue it, and say what is wrong then."""
    run, log = folder / f"at-{point}", folder / f"at-{point}.log"
    argv = command(run, given)
    if forked(log, lambda: killed_at(point, argv, run)) != -signal.SIGKILL:
        return ["was not killed there"]
    if given.twice:
        forked(log, lambda: killed_at(1 + point * 7 % 40, argv, run))  # it may end before it comes to that
    code = forked(log, lambda: continued(argv, run))
    printed = log.read_text(encoding="utf-8").strip()
    if given.show:
        print(printed)
    return [f"exit code {code}: {printed.splitlines()[-1:]}"] if code else differences(state_of(run), expected)


def undisturbed(folder: Path, given: argparse.Namespace) -> tuple[State, list[str]]:
    """Run the training twice without a kill, first here, so that copies have all loaded. Returns its end and points."""
    from rwkv_es.cli import main as rwkv_es
    from rwkv_es.system import lock

    lock.Lock._beat = lambda _: None  # type: ignore[method-assign]  # what is done to files is the same in every run then
    with contextlib.redirect_stdout(io.StringIO()):
        code = rwkv_es(command(folder / "undisturbed", given)) or rwkv_es(["replay", str(folder / "undisturbed")])
    if code:
        raise SystemExit(f"crash_points: the undisturbed training ended with code {code}")
    expected, seen, run = state_of(folder / "undisturbed"), folder / "seen", folder / "counted"
    forked(folder / "counted.log", lambda: killed_at(0, command(run, given), run, seen))
    if unlike := differences(state_of(run), expected):
        raise SystemExit(f"crash_points: two undisturbed trainings differ: {'; '.join(unlike)}")
    return expected, seen.read_text(encoding="utf-8").splitlines()


def main(argv: list[str] | None = None) -> int:
    """Kill at the points that are asked for. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only every so many points")
    parser.add_argument("--points", type=int, nargs="+", help="only these, counted from 1")
    parser.add_argument("--snapshot-every", type=int, default=1)
    parser.add_argument("--twice", action="store_true", help="kill the start that continues, too")
    parser.add_argument("--show", action="store_true", help="print what the starts print")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder, num_failed = Path(temporary), 0
        expected, seen = undisturbed(folder, given)
        points = given.points or list(range(1, len(seen) + 1, given.every))
        for point in points:
            if faults := faults_at(point, folder, given, expected):
                num_failed += 1
                print(f"point {point} of {len(seen)} ({seen[point - 1]}): {'; '.join(faults)}", flush=True)
    print(f"{len(points)} of {len(seen)} points, a run killed at each: {num_failed} failed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
