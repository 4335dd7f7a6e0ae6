import pytest
import torch
from models import make_model

from rwkv_es.config.options import Config
from rwkv_es.engine import capacity
from rwkv_es.system.errors import ConfigError

GB = 10**9


@pytest.fixture
def on_a_gpu(tmp_path, monkeypatch):
    """A model whose tensors say that they are on a GPU, with some free bytes there."""
    model = make_model(tmp_path, 2, 64, 48, dtype=torch.bfloat16)
    monkeypatch.setattr(type(model), "like", property(lambda self: torch.empty(1, device="meta", dtype=torch.bfloat16)))
    return lambda free: monkeypatch.setattr(capacity, "_free", lambda _: free) or model


def test_on_a_gpu_as_many_generations_as_fit(on_a_gpu):
    """A row of two layers of width 64 has 36 KB of state and takes some more between the products."""
    chosen = {free: capacity.slots_of(Config(population=2), on_a_gpu(free * GB)) for free in (3, 4, 8)}
    assert all(slots % 64 == 0 for slots in chosen.values())
    state = 2 * 64 * (64 * 4 + 2 * 2)
    for free, slots in chosen.items():
        assert 0.8 * free * GB - 3 * GB < slots * state < free * GB
    assert chosen[4] < chosen[8]
    half = capacity.slots_of(Config(population=2, state_dtype="fp16"), on_a_gpu(8 * GB))
    assert half > 1.2 * chosen[8]


def test_states_of_episodes_that_wait_take_the_place_of_generations(on_a_gpu):
    """Twice the slots wait at most: beside the states of the slots three times in all, and plain torch's workspace."""
    alone, waiting = (
        capacity.slots_of(Config(population=2, engine="torch"), on_a_gpu(8 * GB), has_turns=h) for h in (False, True)
    )
    state, workspace, logits = 2 * 64 * (64 * 4 + 2 * 2), 80 * 64 * 2, 48 * 4
    assert alone / waiting == pytest.approx((3 * state + workspace + logits) / (state + workspace + logits), rel=0.02)


def test_the_option_counts_if_it_is_given_and_256_on_a_cpu(on_a_gpu, tmp_path):
    assert capacity.slots_of(Config(slots=24), on_a_gpu(GB)) == 24
    with pytest.raises(ConfigError, match=r"no generation fits: \d.* GB are needed .* and 0\.\d GB are there; try"):
        capacity.slots_of(Config(), on_a_gpu(GB // 8))


def test_256_on_a_cpu(tmp_path):
    assert capacity.slots_of(Config(), make_model(tmp_path, 2, 64, 48)) == 256
