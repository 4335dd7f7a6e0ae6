"""Models by their names on the hub, by a stand-in that serves a local folder as huggingface_hub's functions do."""

import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
from places import ROOT

from rwkv_es.cli import main
from rwkv_es.pretrained.header import resolve
from rwkv_es.system.errors import CheckpointError

TINY = ROOT / "rwkv_es" / "tiny"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose repositories are folders, and a cache."""
    shelves, cache, asked = tmp_path / "hub", tmp_path / "cache", []

    def download(repo, file):
        asked.append((repo, file))
        if not (shelves / repo / file).is_file():
            raise FileNotFoundError(f"404: {file} is not in {repo}\nmore lines")
        (cache / repo).mkdir(parents=True, exist_ok=True)
        return shutil.copy(shelves / repo / file, cache / repo / file)

    def snapshot(repo, allow_patterns):
        (cache / repo).mkdir(parents=True, exist_ok=True)
        for path in {found for pattern in allow_patterns for found in (shelves / repo).glob(pattern)}:
            download(repo, path.name)
        return str(cache / repo)

    module = ModuleType("huggingface_hub")
    module.hf_hub_download, module.snapshot_download = download, snapshot
    module.HfApi = lambda: SimpleNamespace(
        list_repo_files=lambda repo: sorted(p.name for p in (shelves / repo).iterdir())
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    for repo, files in (
        ("BlinkDL/rwkv7-g1", ("a.pth", "b.pth")),
        ("RWKV/dir", ("config.json", "model.safetensors", "x.bin")),
    ):
        (shelves / repo).mkdir(parents=True)
        for file in files:
            shutil.copy(TINY / "rwkv7-tiny.pth", shelves / repo / file)
    return SimpleNamespace(cache=cache, asked=asked)


def test_a_file_is_fetched_and_used_like_any_other(hub, capsys):
    path = resolve("hf:BlinkDL/rwkv7-g1/a.pth")
    assert path == hub.cache / "BlinkDL/rwkv7-g1/a.pth"
    assert path.read_bytes() == (TINY / "rwkv7-tiny.pth").read_bytes()
    assert main(["plan", "hf:BlinkDL/rwkv7-g1/a.pth"]) == 0
    assert capsys.readouterr().out.startswith("a.pth on this CPU")


def test_of_a_directory_only_what_cannot_run_or_is_needed_is_fetched(hub):
    assert resolve("hf:RWKV/dir") == hub.cache / "RWKV/dir"
    assert {file for _, file in hub.asked} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf:BlinkDL/rwkv7-g1", r"name one of its files: hf:BlinkDL/rwkv7-g1/a\.pth, hf:BlinkDL/rwkv7-g1/b\.pth$"),
        (
            "hf:BlinkDL/rwkv7-g1/c.pth",
            r"cannot be fetched \(404: c\.pth is not in BlinkDL/rwkv7-g1\); mind its spelling",
        ),
        ("hf:", "is written hf:OWNER/NAME/FILE.pth"),
        ("hf:BlinkDL", "is written hf:OWNER/NAME/FILE.pth"),
    ],
)
def test_what_is_not_there_is_a_sentence(hub, name, words):
    with pytest.raises(CheckpointError, match=words):
        resolve(name)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        resolve("hf:BlinkDL/rwkv7-g1/a.pth")
