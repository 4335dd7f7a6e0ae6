"""Checkpoints of the Hugging Face hub: downloaded once, with progress, and kept in its cache."""

from pathlib import Path

from rwkv_es.system.errors import CheckpointError

HUB = "hf:"
_WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.py")  # of a directory: nothing pickled
_MOST_NAMED = 5


def fetched(name: str) -> Path:
    """Return the local copy of `hf:OWNER/NAME/FILE`, or of the Hugging Face directory `hf:OWNER/NAME`.

    Raises:
        CheckpointError: it cannot be fetched, or the repository is no such directory.
    """
    owner, _, rest = name.removeprefix(HUB).partition("/")
    place, _, file = rest.partition("/")
    if not (owner and place):
        raise CheckpointError(f"a model of the hub is written hf:OWNER/NAME/FILE.pth or hf:OWNER/NAME; got {name!r}")
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(f"{name} is fetched by huggingface_hub: pip install huggingface_hub") from None
    repo = f"{owner}/{place}"
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repo, file))
        found = Path(huggingface_hub.snapshot_download(repo, allow_patterns=list(_WANTED)))
        if (found / "config.json").is_file():
            return found
        files = [each for each in huggingface_hub.HfApi().list_repo_files(repo) if each.endswith(".pth")]
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{name} cannot be fetched ({reason}); mind its spelling and the network") from None
    named = f"name one of its files: {', '.join(f'{HUB}{repo}/{each}' for each in files[:_MOST_NAMED])}"
    raise CheckpointError(f"{name} is no Hugging Face directory; {named if files else 'it has no .pth either'}")
