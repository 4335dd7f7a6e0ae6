"""Checkpoints of the Hugging Face hub: downloaded once, with progress, and kept in its cache."""

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rwkv_es.system.errors import CheckpointError

HUB = "hf:"
_WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.py")  # of a directory: nothing pickled
_MOST_NAMED = 5
_END = 4 << 20  # bytes: what describes the tensors of a model is at the beginning or the end of its file


def fetched(name: str) -> Path:
    """Return the local copy of `hf:OWNER/NAME/FILE`, or of the Hugging Face directory `hf:OWNER/NAME`.

    Raises:
        CheckpointError: it cannot be fetched, or the repository is no such directory.
    """
    huggingface_hub, (repo, file) = _library(name), _parted(name)
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repo, file))
        found = Path(huggingface_hub.snapshot_download(repo, allow_patterns=list(_WANTED)))
        if (found / "config.json").is_file():
            return found
        files = [each for each in huggingface_hub.HfApi().list_repo_files(repo) if each.endswith(".pth")]
    except (OSError, ValueError) as error:
        raise _not_there(name, error) from None
    named = f"name one of its files: {', '.join(f'{HUB}{repo}/{each}' for each in files[:_MOST_NAMED])}"
    raise CheckpointError(f"{name} is no Hugging Face directory; {named if files else 'it has no .pth either'}")


def skimmed(name: str) -> Path:
    """Return the beginnings and ends of what `fetched` would return, for who looks at headers: files full of holes.

    A file that is in the cache is returned as it is.

    Raises:
        CheckpointError: as for `fetched`.
    """
    hub, (repo, file) = _library(name), _parted(name)
    try:
        cached = hub.try_to_load_from_cache(repo, file) if file else None
        if isinstance(cached, str):
            return Path(cached)
        wanted = [file] if file else hub.HfApi().list_repo_files(repo)
        if not file and "config.json" not in wanted:
            return fetched(name)  # says what there is
        folder = Path(tempfile.mkdtemp(prefix="rwkv-es-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for each in wanted:
            if file or any(fnmatch(each, pattern) for pattern in _WANTED):
                _skim(hub.HfFileSystem(), f"{repo}/{each}", folder / each)
    except (OSError, ValueError) as error:
        raise _not_there(name, error) from None
    return folder / file


def _skim(files: Any, remote: str, local: Path) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    size = files.size(remote)
    with files.open(remote, "rb", block_size=_END) as source, local.open("wb") as target:
        target.write(source.read(_END))
        source.seek(max(size - _END, 0))
        target.seek(max(size - _END, 0))
        target.write(source.read())


def _parted(name: str) -> tuple[str, str]:
    """Return the repository, and the file in it if one is named."""
    owner, _, rest = name.removeprefix(HUB).partition("/")
    place, _, file = rest.partition("/")
    if not (owner and place) or ".." in file.split("/"):
        raise CheckpointError(f"a model of the hub is written hf:OWNER/NAME/FILE.pth or hf:OWNER/NAME; got {name!r}")
    return f"{owner}/{place}", file


def _not_there(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"{name} cannot be fetched ({_reason(error)}); mind its spelling and the network")


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def pushed(repo: str, paths: Sequence[Path], card: str) -> str:
    """Upload files, or a directory's, and a model card to a repository, which is made if it is not there.

    Raises:
        CheckpointError: the hub does not take them; what was uploaded stays there.
    """
    try:
        hub = _library(repo).HfApi()
        hub.create_repo(repo, exist_ok=True)
        for path in paths:
            if path.is_dir():
                hub.upload_folder(repo_id=repo, folder_path=str(path))
            else:
                hub.upload_file(repo_id=repo, path_or_fileobj=str(path), path_in_repo=path.name)
        hub.upload_file(repo_id=repo, path_or_fileobj=card.encode(), path_in_repo="README.md")
    except (OSError, ValueError) as error:
        reason = _reason(error)
        raise CheckpointError(f"{repo} was not published ({reason}); the files stay here; is HF_TOKEN set?") from None
    return f"{HUB}{repo}"


def _library(name: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(f"{name} needs the hub's library: pip install huggingface_hub") from None
    return huggingface_hub
