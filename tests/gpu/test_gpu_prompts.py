"""Many tokens of a row read at once: the bits of one by one, and what float64 numpy computes."""

import pytest
import reference
import torch
from interpreted import DEVICE, HAS_GPU, in_the_interpreter, on_device  # noqa: F401
from models import KINDS, make_model, random_tokens, written_out
from perturbed import noise_of

from rwkv_es.gpu import engine as gpu
from rwkv_es.gpu import trial
from rwkv_es.gpu.operands import Reading, Texts
from rwkv_es.model.forward import State, draw_factors, new_state, perturb
from rwkv_es.model.weights import Weights

V = 48
SLOTS = [6, 0, 3, 5]  # of seven
COUNTS = [8, 1, 0, 5]  # tokens that their rows read at once: all, one, nobody is there, some
MEMBERS = [0, 1, 5, 4, 2, 2, 3]  # by slot


def read_at_once(engine, weights, tokens, state):
    """Let rows read COUNTS of their tokens, of which none but these are looked at."""
    live = torch.arange(8) < torch.tensor(COUNTS)[:, None]
    slot = torch.tensor(SLOTS, device=DEVICE)
    by_token, texts = slot.repeat_interleave(8), Texts(slot, torch.tensor(COUNTS, dtype=torch.int32, device=DEVICE))
    seen = weights.rows(by_token)
    sign = torch.zeros(32, device=DEVICE) if seen.sign is None else seen.sign
    direction = torch.zeros_like(by_token) if seen.direction is None else seen.direction
    numbers = torch.where(live.to(DEVICE), tokens[slot][:, :8], V - 1).flatten()
    engine.read_texts_(seen, Reading(texts, numbers, direction, sign, live.to(DEVICE, torch.int32).flatten()), state)


def read_one_by_one(engine, weights, tokens, state):
    """Let every row read one token a tick, among 32 rows: as many as tokens are read at once. Most are at rest."""
    order = torch.arange(32, device=DEVICE) % 7
    engine.live.zero_()
    for t in range(max(COUNTS)):
        engine.live[SLOTS] = (torch.tensor(COUNTS) > t).to(DEVICE, torch.int32)
        copied = State(*(part[:, order].clone() for part in state))
        engine.read_(weights.rows(order), tokens[order, t], copied)
        for slot, count in zip(SLOTS, COUNTS):
            for part, renewed in zip(state, copied):
                if t < count:
                    part[:, slot] = renewed[:, slot]


def made(tmp_path, kind, rank, dtype, state):
    plain = make_model(tmp_path, 2, 64, V, dtype=dtype)
    model = on_device(plain)._replace(state_dtype=state)
    if kind is None:
        return plain, model, None, Weights(model.params)
    factors = draw_factors(noise_of(model, KINDS[kind], rank), model, range(3))
    return plain, model, factors, perturb(model, factors, torch.tensor(MEMBERS, device=DEVICE))


def started(model):
    """Return a state in the middle of a text."""
    state, generator = new_state(model, 7), torch.Generator().manual_seed(1)
    for part in state:
        part.copy_(torch.randn(part.shape, generator=generator).to(DEVICE))
    return state


@pytest.mark.bits
@pytest.mark.parametrize(
    ("kind", "rank", "dtype", "state"),
    [
        ("matrices", 1, torch.bfloat16, torch.float16),
        ("matrices", 3, torch.float32, torch.float32),
        ("embedding", 1, torch.bfloat16, torch.float32),
        (None, 1, torch.float32, torch.float16),
    ],
)
def test_tokens_read_at_once_have_the_bits_of_one_by_one(tmp_path, kind, rank, dtype, state):
    """The states of their slots; those of other slots stay as they are."""
    _, model, factors, weights = made(tmp_path, kind, rank, dtype, state)
    tokens, found, expected = random_tokens(7, 8, V).to(DEVICE), started(model), started(model)
    before = started(model)
    with gpu.running(model, factors, 32) as engine:
        read_at_once(engine, weights, tokens, found)
        read_one_by_one(engine, weights, tokens, expected)
    for part, other, start in zip(found, expected, before):
        assert torch.equal(part, other)
        moved = [slot for slot in range(7) if not torch.equal(part[:, slot], start[:, slot])]
        assert moved == [0, 5, 6]


@pytest.mark.parametrize(("kind", "rank"), [("matrices", 1), ("matrices", 4), ("embedding", 3)])
def test_the_token_after_a_text_has_the_logits_of_float64_numpy(tmp_path, kind, rank):
    plain, model, factors, weights = made(tmp_path, kind, rank, torch.float32, torch.float32)
    tokens, state = random_tokens(7, 9, V).to(DEVICE), new_state(model, 7)
    with gpu.running(model, factors, 32) as engine:
        read_at_once(engine, weights, tokens, state)
        last = tokens[torch.arange(7), torch.tensor([1, 0, 0, 0, 0, 5, 8])]
        found = engine.logits(weights, engine.read_(weights, last, state))
    for slot, count in zip(SLOTS, COUNTS):
        params = written_out(plain, noise_of(plain, KINDS[kind], rank), MEMBERS[slot])
        expected = reference.logits(params, tokens[slot, : count + 1].tolist())[-1]
        assert abs(found[slot].double().cpu().numpy() - expected).max() / abs(expected).max() <= 1e-4


def test_the_trial_reads_a_text_too(tmp_path, monkeypatch):
    """The engine is not used by itself if what it reads at once is not what torch reads."""
    _, model, factors, _ = made(tmp_path, "matrices", 1, torch.float32, torch.float32)
    monkeypatch.setattr(trial, "_found", {})
    assert trial.reason_against(model, factors) == ""
    monkeypatch.setattr(trial, "_found", {})
    monkeypatch.setattr(gpu.GpuEngine, "read_texts_", lambda *_: None)
    assert "its logits differ from torch's by" in trial.reason_against(model, factors)
