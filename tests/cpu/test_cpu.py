"""The fused CPU engine against the plain torch one, which test_model.py holds against outside truth."""

import time

import numpy as np
import pytest
import reference
import torch
from models import KINDS, make_model, random_tokens, written_out
from perturbed import FUSED_KINDS, decode, noise_of
from rollouts import HOT, NEVER, V, requests_of

from rwkv_es.cpu import engine as cpu
from rwkv_es.cpu.kernels import exp_array
from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.rollout import rollout
from rwkv_es.model import forward as torch_engine
from rwkv_es.model.forward import draw_factors, forward, logits, new_state, perturb, reset_rows_, with_initial_state
from rwkv_es.model.layers import announced
from rwkv_es.model.weights import Weights
from rwkv_es.system.errors import ConfigError


@pytest.mark.parametrize("rank", [1, 3, 4, 9])  # the kernels take four ranks at a time, then single ones
@pytest.mark.parametrize("kind", FUSED_KINDS)
def test_a_perturbed_row_equals_float64_numpy_with_its_perturbation_written_out(tmp_path, kind, rank):
    model = make_model(tmp_path, n_layer=2)
    if kind == "state":
        model = with_initial_state(model)
    noise = noise_of(model, KINDS[kind], rank)
    members, tokens = torch.tensor([0, 1, 5, 4, 2, 2, 3, 0]), random_tokens(8, 10, 64)
    factors = draw_factors(noise, model, range(3))
    with cpu.running(model, factors, 1) as engine:
        ours, _ = decode(engine, model, tokens, perturb(model, factors, members))
    for row, member in enumerate(members.tolist()):
        params = written_out(model, noise, member)
        initial = [params.pop(f"blocks.{i}.att.time_state") for i in range(2)] if kind == "state" else None
        expected = reference.logits(params, tokens[row].tolist(), initial)
        found = ours[row].double().numpy()
        assert abs(found - expected).max() / abs(expected).max() <= 1e-4
        assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize(("n_layer", "n_embd"), [(3, 64), (2, 192)])
def test_states_and_logits_equal_the_torch_engine(tmp_path, n_layer, n_embd):
    model = make_model(tmp_path, n_layer, n_embd)
    tokens, weights = random_tokens(16, 12, 64), Weights(model.params)
    expected_state = new_state(model, 16)
    expected = torch.stack([logits(weights, forward(weights, model.arch, t, expected_state)) for t in tokens.T], 1)
    with cpu.running(model, None, 1) as engine:
        found, state = decode(engine, model, tokens, weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    for part, expected_part in zip(state, expected_state):
        torch.testing.assert_close(part, expected_part, rtol=1e-4, atol=2e-5)


@pytest.mark.bits
def test_states_of_fp16_cost_little_precision_and_are_the_same_in_both_engines(tmp_path):
    model = make_model(tmp_path, 3)
    half = model._replace(state_dtype=torch.float16)
    tokens, weights = random_tokens(16, 40, 64), Weights(model.params)
    with cpu.running(half, None, 1) as engine:
        found, state = decode(engine, half, tokens, weights)
        exact, exact_state = decode(engine, model, tokens, weights)
    plain, plain_state = decode(torch_engine, half, tokens, weights)
    assert state.wkv.dtype == plain_state.wkv.dtype == torch.float16
    assert exact_state.wkv.dtype == torch.float32
    difference = abs(found - exact).max() / abs(exact).max()
    assert 1e-6 < difference < 2e-3  # half an ulp of fp16 is 2.4e-4 of a state's entry, and many entries are summed
    assert abs(found - plain).max() / abs(exact).max() < 1e-3  # a value between two neighbours may go either way
    assert torch.equal(decode(torch_engine, half, tokens[:8], weights)[0], plain[:8])


def test_a_state_of_fp16_starts_from_the_initial_state(tmp_path):
    model = with_initial_state(make_model(tmp_path, 2))._replace(state_dtype=torch.float16)
    generator = torch.Generator().manual_seed(0)
    for i in range(2):
        model.params[f"blocks.{i}.att.time_state"].copy_(torch.randn(1, 64, 64, generator=generator))
    state = new_state(model, 8)
    reset_rows_(state, Weights(model.params), torch.tensor([3]))
    assert torch.equal(state.wkv[1, 3], model.params["blocks.1.att.time_state"].mT.half())
    assert not state.wkv[:, :3].any()


@pytest.mark.bits
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["torch", "numba"])
def test_a_row_that_reads_a_text_at_once_has_the_bits_of_one_that_reads_token_by_token(tmp_path, name, state_dtype):
    model = make_model(tmp_path, n_layer=3)._replace(state_dtype=state_dtype)
    factors = draw_factors(noise_of(model, {"*": 1.0, "head.weight": 2.0}, 2), model, range(4))
    tokens, weights = random_tokens(8, 48, 64), perturb(model, factors, torch.arange(8))
    with cpu.running(model, factors, 2) as fast:
        engine = torch_engine if name == "torch" else fast
        expected, states = decode(engine, model, tokens, weights)
        for row in range(8):
            state = new_state(model, 1)
            of_row = weights.rows(torch.full((24,), row))
            hidden = [engine.forward(of_row, model.arch, part, state) for part in tokens[row].split(24)]
            assert torch.equal(torch.cat([engine.logits(of_row, x) for x in hidden]), expected[row])
            assert all(torch.equal(part[:, 0], whole[:, row]) for part, whole in zip(state, states))


@pytest.mark.bits
def test_a_model_whose_first_layer_has_no_value_mix(tmp_path):
    model = make_model(tmp_path)
    params = {
        name: tensor
        for name, tensor in model.params.items()
        if not name.startswith("blocks.0.att.v") or "value" in name
    }
    assert len(params) == len(model.params) - 3
    tokens = random_tokens(8, 5, 64)
    with cpu.running(model, None, 1) as engine:
        expected, _ = decode(engine, model, tokens, Weights(model.params))
    without = model._replace(params=params)
    with cpu.running(without, None, 1) as engine:
        assert torch.equal(decode(engine, without, tokens, Weights(params))[0], expected)


@pytest.mark.bits
@pytest.mark.parametrize(("threads", "state_dtype"), [(1, torch.float32), (2, torch.float16), (3, torch.float32)])
def test_threads_blocks_and_places_never_change_a_bit(tmp_path, monkeypatch, threads, state_dtype):
    model = make_model(tmp_path)._replace(state_dtype=state_dtype)
    factors = draw_factors(noise_of(model, {"*": 1.0, "head.weight": 2.0}, 2), model, range(8))
    members, tokens = torch.arange(200) % 16, random_tokens(200, 4, 64)
    with cpu.running(model, factors, 1) as engine:
        expected, _ = decode(engine, model, tokens, perturb(model, factors, members))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(threads))
    monkeypatch.setattr(cpu, "ROWS_PER_BLOCK", 40)
    with cpu.running(model, factors, threads) as engine:
        found, _ = decode(engine, model, tokens[order], perturb(model, factors, members[order]))
    assert torch.equal(found, expected[order])


@pytest.mark.parametrize("threads", [1, 2])
def test_completions_equal_the_torch_engine(tmp_path, threads):
    """Sampled tokens differ only where rounding decides between two; here none does."""
    model = make_model(tmp_path, n_vocab=V)
    factors = draw_factors(noise_of(model, {"matrices": 1.0}, 1), model, range(4))
    requests = requests_of(8, 6)
    plain = rollout(model, requests, GenerationConfig(NEVER, HOT, 24, "torch"), factors)
    fast = rollout(model, requests, GenerationConfig(NEVER, HOT, 24, "numba", threads), factors)
    assert fast == plain


def test_what_the_engine_cannot_run_goes_to_torch_or_is_refused(tmp_path):
    model = make_model(tmp_path, n_vocab=V)
    low = model._replace(params={name: tensor.bfloat16() for name, tensor in model.params.items()})
    factors = draw_factors(noise_of(low, {"matrices": 1.0}, 1), low, range(4))
    assert not cpu.is_able(low, factors) and not cpu.is_able(low, None) and cpu.is_able(model, None)
    requests = requests_of(2, 2)
    assert len(rollout(low, requests, GenerationConfig(NEVER), factors).completions) == 4
    with pytest.raises(ConfigError, match="engine numba needs"):
        rollout(low, requests, GenerationConfig(NEVER, engine="numba"), factors)


def test_threads_of_torch_are_given_back(tmp_path):
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), cpu.running(make_model(tmp_path), None, 2):
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_a_slow_first_call_says_what_it_does(capsys, monkeypatch):
    monkeypatch.setattr("rwkv_es.model.layers.SLOW_START_S", 0.0)
    with announced(cpu._COMPILING):
        torch.randn(3_000_000).sort()
    assert "compiling the CPU kernels" in capsys.readouterr().err


def test_a_slow_first_call_that_compiles_nothing_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr("rwkv_es.model.layers.SLOW_START_S", 0.01)
    with announced(cpu._COMPILING, lambda: False):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
    is_compiling = iter([False, False, True])
    with announced(cpu._COMPILING, lambda: next(is_compiling)):
        time.sleep(0.5)
    assert capsys.readouterr().err.count("compiling the CPU kernels") == 1


def test_exponential_is_exact_to_a_few_ulps():
    x = np.linspace(-80, 80, 200_001, dtype=np.float32)
    out = np.empty_like(x)
    exp_array(x, out)
    exact = np.exp(x.astype(np.float64))
    assert (abs(out - exact) / exact).max() < 4e-7 + 80 * 2**-24  # the argument's own rounding, and 3 ulps
