import os

from places import ROOT

os.environ["RWKV_V7_ON"] = "1"  # read by the rwkv package when it is imported

import itertools
import random
import sys

import pytest
import torch

from rwkv_es.task import load_task

sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

import pretrain_tiny  # noqa: E402
from rwkv7_sequence import forward, init_params, wkv_chunked  # noqa: E402

TINY = ROOT / "rwkv_es" / "tiny"


@pytest.fixture(scope="module")
def tiny():
    return torch.load(TINY / "rwkv7-tiny.pth", weights_only=True)


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain_tiny.Tokenizer.from_file(str(TINY / "rwkv7-tiny.tokenizer.json"))


def noisy_params(n_layer, n_embd, n_vocab):
    generator = torch.Generator().manual_seed(1)
    params = init_params(n_layer, n_embd, n_vocab, 32, seed=0)
    return {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in params.items()}


@pytest.mark.filterwarnings("ignore")  # the package's own
def test_two_packed_sequences_give_the_logits_of_the_rwkv_package(tmp_path):
    from rwkv.model import RWKV_x070

    params = noisy_params(n_layer=2, n_embd=128, n_vocab=50)
    torch.save(params, tmp_path / "random.pth")
    tokens = torch.randint(50, (1, 64), generator=torch.Generator().manual_seed(2))
    starts = torch.zeros(1, 64, dtype=torch.bool)
    starts[0, [0, 32]] = True
    packed = torch.nn.functional.linear(forward(params, tokens, starts)[0], params["head.weight"])
    client = RWKV_x070(str(tmp_path / "random"), "cpu fp32")
    alone = [client.forward(part, None, full_output=True)[0] for part in tokens[0].view(2, 32).tolist()]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=5e-5)  # fp32, other order of sums


def test_chunked_state_update_has_the_value_and_gradient_of_the_recurrence():
    generator = torch.Generator().manual_seed(3)
    r, k, v, kk, a, raw = (torch.randn(2, 1, 32, 64, generator=generator) for _ in range(6))
    kk = torch.nn.functional.normalize(kk, dim=-1)
    inputs = [t.requires_grad_() for t in (r, -0.6 * raw.sigmoid(), k, v, kk, kk.detach() * a.sigmoid())]
    keep = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    expected = recurrence(*inputs, keep)
    weight = torch.randn(expected.shape, generator=generator)
    want = torch.autograd.grad((expected * weight).sum(), inputs)
    *first, kk, b = inputs
    result = wkv_chunked(*first, kk=kk, b=b, keep=keep)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)  # fp32 through 16 decays' inverse, up to 1e4
    torch.testing.assert_close(torch.autograd.grad((result * weight).sum(), inputs), want, rtol=1e-3, atol=1e-3)


def recurrence(r, logw, k, v, kk, b, keep):
    state, ys = torch.zeros(2, 1, 64, 64), []
    for t in range(32):
        state = state * keep[:, t // 16, None, None, None] if t % 16 == 0 else state
        removed = state @ kk[:, :, t, :, None]
        state = state * logw[:, :, t, None].exp() - removed * b[:, :, t, None] + v[:, :, t, :, None] * k[:, :, t, None]
        ys.append((state @ r[:, :, t, :, None]).squeeze(-1))
    return torch.stack(ys, 2)


def test_shipped_checkpoint_has_the_official_layout_and_a_small_size(tiny):
    assert 1_000_000 < (TINY / "rwkv7-tiny.pth").stat().st_size < 4_000_000
    att = [
        "x_r",
        "x_w",
        "x_k",
        "x_v",
        "x_a",
        "x_g",
        "w1",
        "w2",
        "w0",
        "a1",
        "a2",
        "a0",
        "v1",
        "v2",
        "v0",
        "g1",
        "g2",
        "k_k",
        "k_a",
        "r_k",
    ]
    att += ["receptance.weight", "key.weight", "value.weight", "output.weight", "ln_x.weight", "ln_x.bias"]
    names = ["emb.weight"]
    for layer in range(3):
        norms = ["ln1", "ln2", "ln0"][: 3 if layer == 0 else 2]
        names += [f"blocks.{layer}.{norm}.{kind}" for norm in norms for kind in ("weight", "bias")]
        names += [f"blocks.{layer}.att.{name}" for name in att]
        names += [f"blocks.{layer}.ffn.{name}" for name in ("x_k", "key.weight", "value.weight")]
    assert list(tiny) == [*names, "ln_out.weight", "ln_out.bias", "head.weight"]
    shapes = {name: tuple(init_params(3, 64, 115, 64, seed=0)[name].shape) for name in tiny}
    assert {name: tuple(t.shape) for name, t in tiny.items()} == shapes
    assert shapes["blocks.1.att.r_k"] == (1, 64) and shapes["blocks.2.att.w1"] == (64, 64)
    assert all(t.dtype == torch.float32 and t.is_contiguous() and t.isfinite().all() for t in tiny.values())


def test_vocabulary_expresses_every_sample_exactly(tokenizer):
    assert tokenizer.get_vocab_size() == 115 and tokenizer.token_to_id("<end>") == 0
    rng = random.Random(0)
    for problem in itertools.islice(load_task("countdown_mini").problems("train"), 0, None, 20):
        for answer in (problem.answer, pretrain_tiny.careless(problem, rng), pretrain_tiny.worked(problem, 0.5, rng)):
            ids = tokenizer.encode(problem.prompt + answer).ids
            assert tokenizer.decode(ids) == problem.prompt + answer
            assert len(ids) <= pretrain_tiny.ROW_LENGTH
    marks = [i for i in ids if i in (pretrain_tiny.ANSWER, tokenizer.token_to_id("</answer>"))]
    assert len(marks) == 2


def test_shipped_vocabulary_is_the_one_the_script_builds(tokenizer):
    assert tokenizer.to_str() == pretrain_tiny.build_tokenizer().to_str()


def test_worked_samples_score_one_with_and_without_dropped_lines():
    task, rng = load_task("countdown_mini"), random.Random(0)
    for problem in task.problems("train")[:300]:
        assert task.reward(problem, pretrain_tiny.worked(problem, 0.9, rng)) == 1.0
        assert pretrain_tiny.worked(problem, 0.0, rng) == problem.answer


def test_packed_rows_hold_the_samples_and_teach_the_answers_alone():
    samples = [([1, 2, 3], list(range(4, 30))), ([5, 6], [7, 0]), ([1] * 8, [2] * 150), ([1] * 8, [2] * 160)]
    batch = pretrain_tiny.pack(iter(samples), num_rows=2)
    assert batch.starts.nonzero().tolist() == [[0, 0], [0, 32], [0, 48], [1, 0], [1, 160]]
    assert batch.tokens[0, :28].tolist() == [1, 2, 3, *range(4, 29)]
    assert batch.targets[0, 2:28].tolist() == list(range(4, 30))
    assert batch.targets[0, 32:36].tolist() == [pretrain_tiny.IGNORE, 7, 0, pretrain_tiny.IGNORE]
    assert (batch.targets != pretrain_tiny.IGNORE).sum() == 26 + 2 + 150


def test_shipped_model_can_work_but_would_rather_guess(tiny, tokenizer):
    problems = load_task("countdown_mini").problems("test")[:64]
    samples = [(tokenizer.encode(p.prompt).ids, [*tokenizer.encode(p.answer).ids, 0]) for p in problems]
    batch = pretrain_tiny.pack(iter(samples), num_rows=64)
    with torch.no_grad():
        chosen = (forward(tiny, batch.tokens, batch.starts) @ tiny["head.weight"].t()).argmax(-1)
    first = (batch.tokens == pretrain_tiny.COLON) & (batch.targets != pretrain_tiny.IGNORE)
    assert (chosen[first] == pretrain_tiny.ANSWER).float().mean() > 0.95
    later = (batch.targets != pretrain_tiny.IGNORE) & ~first
    assert (chosen[later] == batch.targets[later]).float().mean() > 0.97
