"""What a run has put into its folder besides its books: reports and exports. Only these are ever replaced."""

import hashlib
import json
from pathlib import Path

from rwkv_es import files
from rwkv_es.errors import ConfigError

_FILE = ".rwkv-es-made.json"
_END = 1 << 20  # bytes at either end of a file that are looked at


def note(folder: Path, path: Path) -> None:
    """Remember that the run has written a file of its folder, as it is now."""
    files.replace(folder / _FILE, json.dumps({**_noted(folder), path.name: _print(path)}) + "\n")


def refuse_foreign(folder: Path, path: Path) -> None:
    """Refuse to replace a file of a run's folder that the run did not write, or that somebody has changed.

    Raises:
        ConfigError: there is such a file. Runs of releases that kept no note may replace what is there.
    """
    noted = _noted(folder)
    if (folder / _FILE).exists() and path.exists() and noted.get(path.name) != _print(path):
        raise ConfigError(f"{path} was not written by this run, or was changed since; move it away, or choose an --out")


def _noted(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / _FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _print(path: Path) -> str:
    """Return a hash of a file's size and both its ends: enough to tell another one, cheap for large ones."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(f"{size} ".encode() + file.read(_END))
        file.seek(max(0, size - _END))
        digest.update(file.read(_END))
    return digest.hexdigest()
