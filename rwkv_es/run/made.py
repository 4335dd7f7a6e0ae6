"""What a run has put into its folder besides its books: reports and exports. Only these are ever replaced."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rwkv_es.system import files
from rwkv_es.system.errors import ConfigError

_FILE = ".rwkv-es-made.json"
_END = 1 << 20  # bytes at either end of a file that are looked at
_UNFINISHED = ""  # in place of a hash: a crash may have come before or after the file was in its place


def begin(folder: Path) -> None:
    """Note that a new run has made nothing yet."""
    files.replace(folder / _FILE, "{}\n")


@contextmanager
def making(folder: Path, paths: Sequence[Path]) -> Iterator[None]:
    """Let files of a run's folder be written, or replaced if the run wrote them and nobody has changed them since.

    Raises:
        ConfigError: one of them is somebody else's.
    """
    noted = _noted(folder)
    for path in paths:
        if path.exists() and noted.get(path.name) not in (_UNFINISHED, _print(path)):
            raise ConfigError(
                f"{path} was not written by this run, or was changed since; move it away, or choose an --out"
            )
    with files.writing(folder / _FILE):
        _note(folder, {**noted, **{path.name: _UNFINISHED for path in paths}})
    yield
    others = {name: found for name, found in _noted(folder).items() if name not in {path.name for path in paths}}
    with files.writing(folder / _FILE):
        _note(folder, {**others, **{path.name: _print(path) for path in paths if path.exists()}})


def is_unchanged(folder: Path, path: Path) -> bool:
    """Say whether a run has made a file of its folder, and nobody has changed it since."""
    return (folder / _FILE).exists() and _noted(folder).get(path.name) == _print(path)


def _noted(folder: Path) -> dict[str, str]:
    """Return the hashes of what the run has written; of an earlier release's run, which kept no note, of all files."""
    if not (folder / _FILE).exists():
        return {path.name: _print(path) for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}
    try:
        found = json.loads((folder / _FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _note(folder: Path, noted: dict[str, str]) -> None:
    files.replace(folder / _FILE, json.dumps(noted) + "\n")


def _print(path: Path) -> str:
    """Return a hash of a file's size and both its ends: enough to tell another one, cheap for large ones."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(f"{size} ".encode() + file.read(_END))
        file.seek(max(0, size - _END))
        digest.update(file.read(_END))
    return digest.hexdigest()
