"""Models by their names on the hub, by a stand-in that serves a local folder as huggingface_hub's functions do."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from checkpoints import random_params
from directories import write_directory
from places import ROOT

from rwkv_es.cli import main
from rwkv_es.pretrained.checkpoint import save
from rwkv_es.pretrained.header import describe, resolve
from rwkv_es.system.errors import CheckpointError
from rwkv_es.system.hub import pushed

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

    class Files:
        """HfFileSystem: ranges of remote files."""

        def size(self, path):
            return (shelves / path).stat().st_size

        def open(self, path, mode, block_size):
            asked.append((path, "range"))
            return (shelves / path).open(mode)

    def in_cache(repo, file):
        return str(cache / repo / file) if (cache / repo / file).is_file() else None

    module = ModuleType("huggingface_hub")
    module.HfFileSystem, module.try_to_load_from_cache = Files, in_cache
    module.hf_hub_download, module.snapshot_download = download, snapshot
    sent = {}

    def create(repo, exist_ok):
        if not repo.startswith("me/"):
            raise OSError("401: no token\nmore lines")
        sent.setdefault(repo, {})

    def upload(repo_id, path_or_fileobj, path_in_repo):
        is_path = isinstance(path_or_fileobj, str)
        sent[repo_id][path_in_repo] = Path(path_or_fileobj).read_bytes() if is_path else path_or_fileobj

    def names(repo):
        return sorted(path.name for path in (shelves / repo).iterdir())

    module.HfApi = lambda: SimpleNamespace(list_repo_files=names, create_repo=create, upload_file=upload)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    for repo, files in (
        ("BlinkDL/rwkv7-g1", ("a.pth", "b.pth")),
        ("RWKV/dir", ("config.json", "model.safetensors", "x.bin")),
    ):
        (shelves / repo).mkdir(parents=True)
        for file in files:
            shutil.copy(TINY / "rwkv7-tiny.pth", shelves / repo / file)
    return SimpleNamespace(cache=cache, asked=asked, sent=sent)


def test_a_file_is_fetched_and_used_like_any_other(hub, capsys):
    path = resolve("hf:BlinkDL/rwkv7-g1/a.pth")
    assert path == hub.cache / "BlinkDL/rwkv7-g1/a.pth"
    assert path.read_bytes() == (TINY / "rwkv7-tiny.pth").read_bytes()
    assert main(["plan", "hf:BlinkDL/rwkv7-g1/a.pth"]) == 0
    assert capsys.readouterr().out.startswith("a.pth on this CPU")
    assert ("BlinkDL/rwkv7-g1/a.pth", "range") not in hub.asked, "it is in the cache"


def test_a_plan_fetches_what_describes_the_tensors_and_no_more(hub, tmp_path, capsys, monkeypatch):
    """A file and a directory of many megabytes are planned as when they are here."""
    monkeypatch.setattr("rwkv_es.system.hub._END", 1 << 16)
    params = random_params(4, 256, 3000)
    save(tmp_path / "m.pth", params)
    shutil.copy(tmp_path / "m.pth", tmp_path / "hub/BlinkDL/rwkv7-g1/big.pth")
    assert main(["plan", str(tmp_path / "m.pth"), "--gpus", "1xh100-80"]) == 0
    expected = capsys.readouterr().out.replace("m.pth", "big.pth")
    assert main(["plan", "hf:BlinkDL/rwkv7-g1/big.pth", "--gpus", "1xh100-80"]) == 0
    assert capsys.readouterr().out == expected
    assert hub.asked == [("BlinkDL/rwkv7-g1/big.pth", "range")]
    shutil.rmtree(tmp_path / "hub/RWKV/dir")
    write_directory(tmp_path / "hub/RWKV/dir", params)
    assert describe("hf:RWKV/dir").arch == describe(str(tmp_path / "m.pth")).arch
    assert not (hub.cache / "RWKV").exists()
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        describe("hf:BlinkDL/rwkv7-g1/none.pth")
    with pytest.raises(CheckpointError, match="is written"):
        describe("hf:BlinkDL/rwkv7-g1/../../x.pth")


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


def test_an_export_goes_to_the_hub_with_a_card_that_says_what_it_is(hub, tmp_path, capsys):
    """Accuracies 2 and 5 of 8: Wilson's intervals by hand from its formula with z = 1.959964."""
    run, out = tmp_path / "run", tmp_path / "tuned.pth"
    options = [
        "--steps",
        "2",
        "--population",
        "8",
        "--prompts",
        "2",
        "--eval-every",
        "2",
        "--eval-size",
        "8",
        "--targets",
    ]
    assert (
        main(["train", "--model", "tiny", "--run", str(run), "--threads", "1", *options, "head.weight=5,matrices=1"])
        == 0
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "eval/accuracy" in row:
            row["eval/accuracy"] = 0.25 if row["step"] == 0 else 0.625
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["export", str(run), "--weights", "last", "--out", str(out), "--push", "me/tuned"]) == 0
    assert "published hf:me/tuned" in capsys.readouterr().out
    sent = hub.sent["me/tuned"]
    assert sent["tuned.pth"] == out.read_bytes() and set(sent) == {"tuned.pth", "tuned.tokenizer.json", "README.md"}
    card = sent["README.md"].decode()
    assert "| 0 | 25.0% | 7.1% to 59.1% | 8 |\n| 2 | 62.5% | 30.6% to 86.3% | 8 |" in card
    assert hashlib.sha256((run / "ledger.jsonl").read_bytes()).hexdigest() in card
    assert hashlib.sha256((TINY / "rwkv7-tiny.pth").read_bytes()).hexdigest() in card and "`rwkv7-tiny`" in card
    assert re.search(r"^rwkv-es train .*--steps 2.* --targets head.weight=5,matrices=1", card, re.MULTILINE)
    assert str(tmp_path) not in card


def test_what_the_hub_refuses_is_a_sentence(hub, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"was not published \(401: no token\); the files stay here; is HF_TOKEN set"
    ):
        pushed("them/model", [], "")
