"""TRL's trainer beside our GRPO: what it trains is the same model, asked the same, and it learns."""

import sys

import pytest
import torch
from places import ROOT

sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

pytest.importorskip("trl", reason="needs the extra outside")
pytest.importorskip("cma", reason="needs the extra compare")
pytest.importorskip("rwkv7_hf", reason="needs the extra hf")

import compare_trl  # noqa: E402
import rwkv7_hf.ops_rwkv7 as ops  # noqa: E402
from compare.race import Entry  # noqa: E402
from compare.world import open_world  # noqa: E402

from rwkv_es import load_model, load_task  # noqa: E402


@pytest.fixture(scope="module")
def world():
    return open_world("tiny", "arithmetic_mini")


@pytest.fixture(scope="module")
def converted(world):
    return compare_trl.converted(world, "tiny")


@pytest.mark.parametrize("is_padded", [True, False])
def test_the_recurrence_of_all_rows_is_that_of_rwkv7_hf_and_so_are_its_gradients(is_padded):
    generator = torch.Generator().manual_seed(0)
    r, k, v, a, b = (torch.randn(3, 19, 2, 64, generator=generator) / 8 for _ in range(5))
    decay = 0.55 + 0.45 * torch.rand(3, 19, 2, 64, generator=generator)  # RWKV-7's is above exp(-exp(-0.5)) = 0.545
    given = [r, decay, k, v, a, b]
    mask = torch.ones(3, 19, dtype=torch.bool)
    mask[0, :7], mask[2, :1], mask[2, 17:] = False, False, False
    mask = mask if is_padded else None
    with torch.no_grad():
        state = torch.randn(3, 2, 64, 64, generator=generator)
        for ours, theirs in zip(compare_trl.recurrence(*given, state, mask), ops.rwkv7_recurrent(*given, state, mask)):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)  # fp32 sums in another order
    results = []
    for function in (ops.rwkv7_recurrent, compare_trl.recurrence):
        own = [tensor.clone().requires_grad_() for tensor in given]
        outputs, _ = function(*own, torch.zeros_like(state), mask)
        outputs.square().sum().backward()
        results.append([outputs, *(tensor.grad for tensor in own)])
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_what_trl_trains_is_the_model_and_leaves_under_its_official_names(world, converted):
    policy, tokenizer = converted
    found = compare_trl.official_params(policy)
    assert world.model.params.keys() - found.keys() == {f"blocks.0.att.v{i}" for i in range(3)}, "not used by layer 0"
    assert all(torch.equal(tensor, world.model.params[name]) for name, tensor in found.items())
    prompts = [":3*7=", ":10+10="]
    read = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        logits = policy(**read).logits[:, -1]
    for prompt, row in zip(prompts, logits):
        expected = load_model("tiny")[0].logits(world.tokenizer.encode(prompt))
        torch.testing.assert_close(row, expected, atol=1e-3, rtol=1e-3)  # of a spread of several


def test_the_reward_is_the_tasks_and_sees_what_stands_before_the_stop(world):
    asked = load_task("arithmetic_mini").problems("train")[:2]
    texts = [f"{asked[0].answer},", f"{asked[0].answer},"]
    ids = [world.tokenizer.encode(text) for text in texts]
    reward = compare_trl.reward_of(world, asked)
    assert asked[0].answer != asked[1].answer and reward(completion_ids=ids, place=[0, 1], prompts=[]) == [1.0, 0.0]


def test_trl_learns_from_the_answers_that_it_is_given(world, monkeypatch):
    """Three steps of 256 answers: some 5 s of one core."""
    monkeypatch.setattr(compare_trl.hf, "rwkv7_recurrent", compare_trl.recurrence)
    entry = Entry("trl", {"lr": 1e-3, "epochs": 1, "prompts": 32}, 0, "generations", 768, points=3)
    records = compare_trl.train(world, entry, world.test)
    assert [record["generations"] for record in records] == [0, 256, 512, 768]
    assert records[0]["accuracy"] < 0.4 < 0.55 < records[-1]["accuracy"]
