"""A tuned model in kilobytes: base and ledger give the exported file again, bit for bit."""

import hashlib
import shutil

import pytest
from small_runs import run

from rwkv_es.cli import main
from rwkv_es.pretrained.checkpoint import load, save
from rwkv_es.pretrained.header import resolve
from rwkv_es.pretrained.tokenizer import json_beside
from rwkv_es.run.snapshots import Best, note_best


@pytest.mark.parametrize("weights", ["best", "last"])
def test_a_tuned_model_is_rebuilt_from_kilobytes_with_the_same_sha256(tmp_path, weights, capsys):
    trained = run(tmp_path / "run", steps=4)
    note_best(trained, Best(2, 0.9))  # not the last
    (tmp_path / "exported").mkdir(), (tmp_path / "rebuilt").mkdir()  # the name of a .pth is a part of its bytes
    main(["export", str(trained), "--weights", weights, "--out", str(tmp_path / "exported" / "tuned.pth")])
    sent = tmp_path / "sent"
    (sent / "snapshots").mkdir(parents=True)
    names = ["config.yaml", "ledger.jsonl", *(["snapshots/best.json"] if weights == "best" else [])]
    for name in names:
        shutil.copy(trained / name, sent / name)
    base = shutil.copy(resolve("tiny"), tmp_path / "base-elsewhere.pth")
    shutil.copy(json_beside(resolve("tiny")), tmp_path / "base-elsewhere.tokenizer.json")
    shutil.rmtree(trained)
    assert main(["apply", str(base), str(sent), "--out", str(tmp_path / "rebuilt" / "tuned.pth")]) == 0
    files = [(tmp_path / name).read_bytes() for name in ("exported/tuned.pth", "rebuilt/tuned.pth")]
    assert files[0] == files[1]
    found = hashlib.sha256(files[1]).hexdigest()
    assert f"weights after {2 if weights == 'best' else 4} steps, sha256 {found})" in capsys.readouterr().out
    assert sum((sent / name).stat().st_size for name in names) < 20_000


def test_another_base_or_ledger_is_refused_by_name(tmp_path, capsys):
    trained = run(tmp_path / "run", steps=2)
    params, _ = load(resolve("tiny"))
    save(tmp_path / "other.pth", {**params, "head.weight": params["head.weight"] + 1})
    assert main(["apply", str(tmp_path / "other.pth"), str(trained), "--out", str(tmp_path / "x.pth")]) == 2
    assert "but the run's base has" in capsys.readouterr().err
    lines = (trained / "ledger.jsonl").read_text().splitlines(keepends=True)
    (trained / "ledger.jsonl").write_text(lines[0].replace('"lr": 0.02', '"lr": 0.03') + lines[1])
    assert main(["apply", "tiny", str(trained / "ledger.jsonl"), "--out", str(tmp_path / "x.pth")]) == 2
    assert not (tmp_path / "x.pth").exists()
