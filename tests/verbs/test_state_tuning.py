"""Tuning nothing but the initial state: the weights stay, and the exported file means the same to the rwkv package."""

import pytest
import torch
from places import ROOT
from small_runs import checksums, run

from rwkv_es.cli import main
from rwkv_es.config.options import Config
from rwkv_es.pretrained.checkpoint import load
from rwkv_es.session import answer, open_session
from rwkv_es.verbs.export import export

STATE = {
    "targets": {"state": 1.0},
    "sigma": 3.0,
    "lr": 20.0,
    "objective": "logprob",
    "max_new_tokens": 0,
    "eval_every": 0,
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = run(tmp_path_factory.mktemp("runs") / "state", **STATE)
    export(Config(run=str(folder), weights="last"))
    return folder


def test_the_state_moves_and_the_weights_do_not(tuned):
    assert len(set(checksums(tuned))) == 4
    base, _ = load(ROOT / "rwkv_es" / "tiny" / "rwkv7-tiny.pth")
    weights, _ = load(tuned / "rwkv7-tiny.pth")
    assert all(torch.equal(weights[name], base[name]) for name in base) and weights.keys() == base.keys()
    state = torch.load(tuned / "rwkv7-tiny-state.pth", weights_only=True)
    assert list(state) == [f"blocks.{i}.att.time_state" for i in range(3)]
    assert all(tensor.shape == (1, 64, 64) and tensor.std() > 0.1 for tensor in state.values())


@pytest.mark.filterwarnings("ignore")  # the package's own
def test_the_rwkv_package_gives_the_same_answers_from_the_exported_state(tuned, monkeypatch):
    """In its forward pass a head's state is [value, key], as in the file."""
    pytest.importorskip("rwkv")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import rwkv_client

    base, state = str(ROOT / "rwkv_es" / "tiny" / "rwkv7-tiny.pth"), str(tuned / "rwkv7-tiny-state.pth")
    session = open_session(Config(model="tiny", state=state, task="countdown_mini", threads=1))
    problems = session.task.problems("test")[:6]
    ours = answer(session, problems).texts
    untuned = answer(open_session(Config(model="tiny", task="countdown_mini", threads=1)), problems).texts
    theirs = [rwkv_client.answer((base, state), "countdown_mini", "", place)["text"] for place in range(6)]
    assert theirs == ours != untuned


def test_the_recipe_tunes_the_state_alone(capsys):
    assert main(["train", "--config", "state", "--dry-run"]) == 0
    assert "targets: {state: 1.0}" in (printed := capsys.readouterr().out) or "state: 1.0" in printed
