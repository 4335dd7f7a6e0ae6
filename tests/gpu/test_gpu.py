"""The GPU kernels and their engine, value by value; on a machine without a GPU they run in Triton's interpreter."""

import gc
import json
import os
import runpy
import subprocess
import sys
import weakref

import numpy as np
import pytest
import reference
import torch
from interpreted import (  # noqa: F401
    DEVICE,
    HAS_GPU,
    capture_that_keeps_nothing,
    in_the_interpreter,
    noise_kernels,
    on_device,
    product_kernels,
)
from interpreted import gpu_kernels as kernels
from models import KINDS, make_model, random_tokens, written_out
from perturbed import GPU_KINDS, decode, noise_of
from places import ROOT
from rollouts import HOT, NEVER, V, requests_of
from torch.nn import functional

from rwkv_es.engine import engines
from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.rollout import rollout
from rwkv_es.es import update
from rwkv_es.gpu import engine as gpu
from rwkv_es.gpu import layer, operands
from rwkv_es.gpu import trial as gpu_trial
from rwkv_es.model import forward as torch_engine
from rwkv_es.model import int8
from rwkv_es.model.forward import draw_factors, new_state, perturb, with_initial_state
from rwkv_es.model.weights import Weights
from rwkv_es.noise import factors as noise_factors
from rwkv_es.noise.targets import UNUSED
from rwkv_es.system.errors import ConfigError

S, C, F, H = 7, 192, 200, 3  # no powers of two
RANKS = (1, 3, 4)
NAMES = ("R", "K", "V", "OUT", "W1", "A1", "V1", "G1", "W2", "A2", "V2", "G2", "FFN_KEY", "FFN_VALUE")
INDEX = {name: getattr(kernels, name).value for name in NAMES}
HALVES = {"w": 24, "a": 17, "v": 40, "g": 5}
SIZES = {
    **dict.fromkeys(("R", "K", "V", "OUT"), (C, C)),
    **{f"{letter.upper()}1": (C, width) for letter, width in HALVES.items()},
    **{f"{letter.upper()}2": (width, C) for letter, width in HALVES.items()},
    **{"FFN_KEY": (C, F), "FFN_VALUE": (F, C)},
}


def random(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(hash((shape, seed)) % 2**31))
    return values.to(DEVICE, dtype)


class Noise:
    """Random factors for some matrices, as the kernels read them and as plain (D,i,r) and (D,r,o) tensors."""

    def __init__(self, names, rank, dtype=torch.float32):
        self.b = {n: random(3, SIZES[n][0], rank, seed=1).bfloat16().float() for n in names}
        self.a = {n: random(3, SIZES[n][1], rank, seed=2).bfloat16().float() for n in names}
        place, scale, sides, width = [-1] * 28, [0.0] * 14, [torch.zeros(3, rank, 5, device=DEVICE)], 5
        for name in names:
            m = INDEX[name]
            place[m], place[14 + m], scale[m] = width, width + SIZES[name][0], 0.01 * (1 + m)
            sides += [self.b[name].mT, self.a[name].mT]
            width += sum(SIZES[name])
        self.scale, self.direction = torch.tensor(scale), torch.tensor([2, 0, 1, 1, 0, 2, 0], device=DEVICE)
        self.sign = torch.tensor([1.0, -1, 1, -1, 0, -1, 1], device=DEVICE)
        self.coefficient = torch.zeros(S, 14, rank, device=DEVICE)
        self.parts = torch.zeros(S, kernels.parts_of(F), rank, device=DEVICE)
        self.seen = kernels.LayerNoise(
            torch.cat(sides, 2).to(dtype).contiguous(),
            self.scale.to(DEVICE),
            self.direction,
            self.sign,
            torch.ones(S, dtype=torch.int32, device=DEVICE),
            self.coefficient,
            self.parts,
            operands.layout_of(rank, width, place),
        )

    def taken(self, x, name):
        """scale * sign * (x @ B), one row at a time: (S,r)."""
        by_row = [float(self.scale[INDEX[name]]) * self.sign[s] * (x[s] @ self.b[name][d]) for s, d in self._rows()]
        return torch.stack(by_row)

    def added(self, coefficient, name):
        """Coefficient @ A.T, one row at a time: (S,o)."""
        return torch.stack([self.a[name][d] @ coefficient[s] for s, d in self._rows()])

    def set_(self, name):
        """Put random coefficients where a kernel reads them; return what it must add."""
        self.coefficient[:, INDEX[name]] = random(S, self.coefficient.shape[2], seed=INDEX[name])
        return self.added(self.coefficient[:, INDEX[name]], name)

    def check_taken(self, x, name):
        close(self.coefficient[:, INDEX[name]], self.taken(x, name))

    def _rows(self):
        return list(enumerate(self.direction.tolist()))


def close(found, expected, tolerance=1e-5):
    """Compare up to rounding: fp32 sums of some 200 terms in another order."""
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def vectors():
    parts = [random(*shape, seed=seed) for seed, shape in enumerate([(2, 2, C), (6, C), (8, C), (C,)])]
    return kernels.LayerVectors(*parts)


@pytest.mark.parametrize("num_rows", [1, S, 72, 136])
@pytest.mark.parametrize("widths", [(24, 17, 40, 5), (64, 130, 0, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_project_down(dtype, widths, num_rows):
    """Against float64, in whole tiles and in parts of them; a row's bits are its own."""
    mixed = random(6, num_rows, C, dtype=dtype)
    matrices = [random(C, n, seed=n, dtype=dtype) / C**0.5 if n else None for n in widths]
    halves = [random(num_rows, max(n, 1), dtype=dtype) for n in widths]
    before = [half.clone() for half in halves]
    product_kernels.project_down(mixed, matrices, tuple(halves))
    rounding = 1e-5 if dtype == torch.float32 else 2**-7  # the interpreter cuts to bf16
    for operand, matrix, half, old in zip((3, 4, 2, 5), matrices, halves, before):
        if matrix is None:
            assert torch.equal(half, old)
            continue
        close(half, mixed[operand].double() @ matrix.double(), rounding)
        alone = [torch.empty_like(part[:1]) for part in halves]
        product_kernels.project_down(mixed[:, -1:].contiguous(), matrices, tuple(alone))
    assert all(torch.equal(a[0], half[-1]) for a, half, m in zip(alone, halves, matrices) if m is not None)


@pytest.mark.parametrize("rank", RANKS)
def test_norm_and_mix(rank):
    operand_of = {"R": 0, "K": 1, "V": 2, "V1": 2, "W1": 3, "A1": 4, "G1": 5}
    x, shift, mixed, layer, made = (
        random(S, C),
        random(S, C, seed=1),
        random(6, S, C),
        vectors(),
        Noise(operand_of, rank),
    )
    before = shift.clone()
    normal = functional.layer_norm(x, (C,), layer.norms[0, 0], layer.norms[0, 1], 1e-5)
    kernels.norm_and_mix(x, shift, layer, mixed, made.seen)
    close(shift, normal)
    for m in range(6):
        close(mixed[m], normal + (before - normal) * layer.mixes[m])
    for name, m in operand_of.items():
        made.check_taken(mixed[m], name)


@pytest.mark.parametrize("rank", RANKS)
def test_activate_pairs(rank):
    names = [letter.upper() + half for letter in HALVES for half in "12"]
    made, halves = Noise(names, rank), {letter: random(S, width) for letter, width in HALVES.items()}
    expected = {letter: half + made.set_(letter.upper() + "1") for letter, half in halves.items()}
    expected["w"], expected["g"] = torch.tanh(expected["w"]), torch.sigmoid(expected["g"])
    kernels.activate_pairs(*halves.values(), made.seen)
    for letter in HALVES:
        close(halves[letter], expected[letter])
        made.check_taken(expected[letter], letter.upper() + "2")


def updated(state, work, layer, is_first, add):
    """The state update of every row and head, written out: the next state, and y before the output matrix."""
    r, k, v, w, a, mix, g = (product + more for product, more in zip(work.products, add))
    w0, a0, v0, k_k, k_a, r_k, weight, bias = layer.vectors
    w, a = torch.exp(-0.606531 * torch.sigmoid(w0 + w)), torch.sigmoid(a0 + a)
    v_first = v if is_first else work.v_first.clone()
    v = v if is_first else v + (v_first - v) * torch.sigmoid(v0 + mix)
    kk, k = k * k_k, k * (1 + (a - 1) * k_a)
    y, renewed = torch.empty(S, C, device=DEVICE), torch.empty_like(state)
    for s in range(S):
        for h in range(H):
            part = slice(64 * h, 64 * h + 64)
            unit = kk[s, part] / kk[s, part].norm()
            old = state[s, h]
            new = old * w[s, part] - torch.outer(old @ unit, unit * a[s, part]) + torch.outer(v[s, part], k[s, part])
            read = functional.layer_norm(new @ r[s, part], (64,), weight[part], bias[part], 64e-5)
            bonus = (r[s, part] * k[s, part] * r_k[part]).sum() * v[s, part]
            renewed[s, h], y[s, part] = new, (read + bonus) * g[s, part]
    return renewed, y, v_first


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("is_first", [True, False])
def test_update_state(rank, is_first):
    names = ["R", "K", "V", "W2", "A2", *([] if is_first else ["V2"]), "G2"]
    made, layer, state = Noise(names, rank), vectors(), random(S, H, 64, 64)
    work = kernels.Work(random(6, S, C), random(7, S, C, seed=3), random(S, C, seed=4))
    nothing = torch.zeros(S, C, device=DEVICE)
    add = [made.set_(name) if name in names else nothing for name in ("R", "K", "V", "W2", "A2", "V2", "G2")]
    renewed, y, v_first = updated(state.mT, work, layer, is_first, add)
    kernels.update_state(state, work, layer, is_first, made.seen)
    close(state, renewed.mT)
    close(work.mixed[0], y, 1e-4)  # the group norm divides by what may be small
    close(work.v_first, v_first)


def test_a_state_of_fp16_is_renewed_in_fp32_and_rounded():
    made, layer, state = Noise([], 1), vectors(), random(S, H, 64, 64).half()
    work = kernels.Work(random(6, S, C), random(7, S, C, seed=3), random(S, C, seed=4))
    add = [torch.zeros(S, C, device=DEVICE)] * 7
    renewed, y, _ = updated(state.float().mT, work, layer, False, add)
    kernels.update_state(state, work, layer, False, made.seen)
    close(state.float(), renewed.mT, 1e-3)
    close(work.mixed[0], y, 1e-4)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("is_target", [True, False])
def test_norm_and_shift(rank, is_target):
    x, shift, mixed, layer = random(S, C), random(S, C, seed=1), random(S, C, seed=2), vectors()
    made = Noise(["OUT", "FFN_KEY"] if is_target else ["FFN_KEY"], rank)
    before, total = shift.clone(), x.clone()
    if is_target:
        total += made.added(made.taken(mixed, "OUT"), "OUT")
    normal = functional.layer_norm(total, (C,), layer.norms[1, 0], layer.norms[1, 1], 1e-5)
    kernels.norm_and_shift(x, shift, layer, mixed, made.seen)
    close(x, total)
    close(shift, normal)
    close(mixed, normal + (before - normal) * layer.ffn_mix)
    made.check_taken(mixed, "FFN_KEY")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("tile", [64, 4096])
def test_square_relu_and_add_ffn_value(rank, dtype, tile, monkeypatch):
    """A row's hidden values are shared by four programs, or worked on by one."""
    monkeypatch.setattr(kernels, "_HIDDEN_TILE", tile)
    made, hidden, x = Noise(["FFN_KEY", "FFN_VALUE"], rank, dtype), random(S, F), random(S, C)
    assert made.parts.shape[1] == (4 if tile == 64 else 1)
    expected = torch.relu(hidden + made.set_("FFN_KEY")).square()
    kernels.square_relu(hidden, made.seen)
    close(hidden, expected)
    close(made.parts.sum(1), made.taken(expected, "FFN_VALUE"))
    total = x + made.added(made.taken(expected, "FFN_VALUE"), "FFN_VALUE")
    kernels.add_ffn_value(x, made.seen)
    close(x, total, 1e-4)  # sums of products of sums


def test_nothing_of_a_row_that_is_not_live_is_read_or_written():
    """Whatever is in such a row (here: nan) stays there, and the others are as without it."""
    names, idle = list(INDEX), torch.tensor([1, 4])

    def run(live):
        made, layer = Noise(names, 1), vectors()
        x, shift, mixed, state = random(S, C), random(S, C, seed=1), random(6, S, C), random(S, H, 64, 64)
        halves, hidden = [random(S, width) for width in HALVES.values()], random(S, F)
        work = kernels.Work(mixed, random(7, S, C, seed=3), random(S, C, seed=4))
        held = [x, shift, state, *halves, hidden, work.v_first, made.coefficient]
        for rows in (*held, *mixed, *work.products):
            rows[~live.bool()] = torch.nan
        seen = made.seen._replace(live=live)
        kernels.norm_and_mix(x, shift, layer, mixed, seen)
        kernels.activate_pairs(*halves, seen)
        kernels.update_state(state, work, layer, True, seen)
        kernels.norm_and_shift(x, shift, layer, mixed[0], seen)
        kernels.square_relu(hidden, seen)
        kernels.add_ffn_value(x, seen)
        return [*held, *mixed]

    live = torch.ones(S, dtype=torch.int32, device=DEVICE)
    everybody = run(live)
    found = run(live.index_fill(0, idle.to(DEVICE), 0))
    for rows, expected in zip(found, everybody):
        assert rows[idle].isnan().all()
        others = [s for s in range(S) if s not in idle]
        assert torch.equal(rows[others], expected[others])


@pytest.mark.parametrize("first_block", [0, 2**28 + 3])
@pytest.mark.parametrize("count", [1, 16, 37, 1100])
def test_random_values_have_the_bits_of_the_torch_reference(count, first_block):
    directions, key = (
        torch.tensor([0, 3, 2**31 + 5], device=DEVICE),
        noise_factors.hash_key("perturbation", 7, "a name"),
    )
    counter, table = (2**31 + 9, *key), noise_factors.normal_table(DEVICE)
    expected = noise_factors.table_values(directions, counter, first_block, count)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((3, count), torch.nan, dtype=dtype, device=DEVICE)
        noise_kernels.fill_from_table(out, first_block, directions, counter, table.to(dtype))
        assert torch.equal(out.float(), expected)


@pytest.mark.parametrize("rows", [slice(None), slice(8, 24)])
def test_a_gpu_draws_factors_by_its_kernel(monkeypatch, rows):
    """In the dtype that is asked for, whole or some rows of A; without the kernel, by plain torch operations."""
    noise = noise_factors.Noise(3, noise_factors.select({"blocks.0.ffn.key.weight": (40, 24)}, {"matrices": 1.0}, 3))
    directions, name = torch.arange(5, device=DEVICE), "blocks.0.ffn.key.weight"
    expected = noise.at(2, 0.1).factors(name, directions, rows)
    monkeypatch.setattr(noise_factors, "fill_from_table", None)
    monkeypatch.setattr(noise_factors, "gpu_kernels", lambda device: noise_kernels)
    by_kernel = noise.at(2, 0.1).factors(name, directions, rows, torch.bfloat16)
    monkeypatch.setattr(noise_factors, "gpu_kernels", lambda device: None)
    plain = noise.at(2, 0.1).factors(name, directions, rows)
    for one, other, third in zip(expected, by_kernel, plain):
        assert other.dtype == torch.bfloat16
        assert torch.equal(one, other.float()) and torch.equal(one, third)


@pytest.mark.parametrize("first", [0, 2**34 + 16])
def test_random_rounding_has_the_bits_of_plain_torch(monkeypatch, first):
    values, steps = 3 * random(1000), 2 * random(1000, seed=1)
    start = (40 * random(1000, seed=2)).to(torch.int8)
    start[:20], steps[:20] = 126, 3.7
    monkeypatch.setattr(update, "round_to_bf16", None)
    monkeypatch.setattr(int8, "move_on_grid", None)
    found = []
    for found_kernels in (noise_kernels, None):
        for module in (update, int8):
            monkeypatch.setattr(module, "gpu_kernels", lambda device, chosen=found_kernels: chosen)
        moved = start.clone()
        int8.move(moved, steps, (5, 2**32 - 1), 2**31 + 3, first)
        found.append((update.round_stochastically(values, (2**32 - 1, 7), 2**31 + 3, first), moved))
    assert all(torch.equal(one, other) for one, other in zip(*found))
    assert not torch.equal(found[0][1], start)


def test_the_matrices_are_those_of_the_cpu_kernels():
    from rwkv_es.cpu import kernels as cpu_kernels

    assert kernels.MATRICES == cpu_kernels.MATRICES
    assert kernels.NUM_MATRICES.value == len(kernels.MATRICES)
    assert {name: getattr(cpu_kernels, name) for name in INDEX} == INDEX


def tiny(tmp_path, n_layer=2, n_embd=64, dtype=torch.float32):
    """Return a random model on the CPU, and the same on the device."""
    model = make_model(tmp_path, n_layer, n_embd, 48, dtype=dtype)
    return model, on_device(model)


def tokens_of(rows, length):
    return random_tokens(rows, length, 48).to(DEVICE)


def perturbed(model, targets, rank, members):
    factors = draw_factors(noise_of(model, targets, rank), model, range(3))
    return factors, perturb(model, factors, torch.tensor(members, device=DEVICE))


@pytest.mark.parametrize(
    ("kind", "rank"), [*(("matrices", rank) for rank in RANKS), *((k, 3) for k in GPU_KINDS if k != "matrices")]
)
def test_a_perturbed_row_equals_float64_numpy_with_its_perturbation_written_out(tmp_path, kind, rank):
    plain, model = tiny(tmp_path)
    if kind == "state":
        plain, model = with_initial_state(plain), with_initial_state(model)
    members, tokens = [0, 1, 5, 4, 2], tokens_of(5, 2)
    factors, weights = perturbed(model, KINDS[kind], rank, members)
    with gpu.running(model, factors, 16) as engine:
        ours, _ = decode(engine, model, tokens, weights)
    for row, member in enumerate(members):
        params = written_out(plain, noise_of(plain, KINDS[kind], rank), member)
        initial = [params.pop(f"blocks.{i}.att.time_state") for i in range(2)] if kind == "state" else None
        expected = reference.logits(params, tokens[row].tolist(), initial)
        assert abs(ours[row].double().cpu().numpy() - expected).max() / abs(expected).max() <= 1e-4


@pytest.mark.parametrize(("n_layer", "n_embd", "rows"), [(3, 64, 9), (1, 192, 6)])
def test_states_and_logits_equal_the_torch_engine(tmp_path, n_layer, n_embd, rows):
    _, model = tiny(tmp_path, n_layer, n_embd)
    tokens, weights = tokens_of(rows, 2), Weights(model.params)
    expected, expected_state = decode(torch_engine, model, tokens, weights)
    with gpu.running(model, None, 16) as engine:
        found, state = decode(engine, model, tokens, weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    for part, expected_part in zip(state, expected_state):
        torch.testing.assert_close(part, expected_part, rtol=1e-4, atol=2e-5)


def test_rows_of_one_state_may_be_read_without_and_with_their_perturbation(tmp_path):
    _, model = tiny(tmp_path, 1)
    factors, weights = perturbed(model, {"matrices": 1.0, "emb.weight": 1.0}, 3, [0, 1, 5, 4, 2])

    def outputs(engine):
        state, tokens = new_state(model, 5), tokens_of(5, 2)
        pairs = zip((Weights(model.params), weights), tokens.T)
        return torch.stack([engine.forward(seen, model.arch, column, state) for seen, column in pairs])

    with gpu.running(model, factors, 16) as engine:
        found = outputs(engine)
    torch.testing.assert_close(found, outputs(torch_engine), rtol=0, atol=2e-5)


def test_a_model_whose_first_layer_has_no_value_mix(tmp_path):
    _, model = tiny(tmp_path)
    params = {n: tensor for n, tensor in model.params.items() if n not in UNUSED}
    assert len(params) == len(model.params) - 3
    with gpu.running(model, None, 16) as engine:
        expected, _ = decode(engine, model, tokens_of(5, 2), Weights(model.params))
    without = model._replace(params=params)
    with gpu.running(without, None, 16) as engine:
        assert torch.equal(decode(engine, without, tokens_of(5, 2), Weights(params))[0], expected)


@pytest.mark.parametrize("rank", [1, 3])
def test_bf16_weights_lose_no_more_than_in_torch(tmp_path, rank):
    """The kernels compute in fp32 and round what they store, torch rounds after every operation."""
    plain, model = tiny(tmp_path, dtype=torch.bfloat16)
    members, tokens = [0, 1, 5, 4, 2], tokens_of(5, 3)
    factors, weights = perturbed(model, {"matrices": 1.0}, rank, members)
    by_torch, _ = decode(torch_engine, model, tokens, weights)
    with gpu.running(model, factors, 16) as engine:
        ours, state = decode(engine, model, tokens, weights)
    assert state.att_shift.dtype == torch.bfloat16 and state.wkv.dtype == torch.float32
    made = noise_of(plain, {"matrices": 1.0}, rank)
    exact = [reference.logits(written_out(plain, made, m), tokens[row].tolist()) for row, m in enumerate(members)]
    error, error_of_torch = (abs(found.double().cpu().numpy() - np.stack(exact)) for found in (ours, by_torch))
    assert error.mean() <= 1.1 * error_of_torch.mean()
    assert error.max() <= 0.05 * abs(np.stack(exact)).max()


def test_a_rows_bits_depend_neither_on_its_place_nor_on_its_company(tmp_path):
    _, model = tiny(tmp_path)
    members, tokens = torch.arange(16) % 6, tokens_of(16, 2)
    factors, weights = perturbed(model, {"matrices": 1.0}, 1, members.tolist())
    chosen = torch.tensor([9, 3, 15, 0, 6, 12, 4, 1])
    with gpu.running(model, factors, 16) as engine:
        expected, _ = decode(engine, model, tokens, weights)
        found, _ = decode(engine, model, tokens[chosen], perturb(model, factors, members[chosen].to(DEVICE)))
    assert torch.equal(found, expected[chosen.to(DEVICE)])


def test_a_captured_step_sees_new_tokens_members_and_states_and_its_memory_lives_on(tmp_path, monkeypatch):
    """What changes between ticks must be written to the memory that the graph reads."""
    monkeypatch.setattr(gpu, "CALLS_BEFORE_CAPTURE", 1)
    _, model = tiny(tmp_path, 1)
    perturbs = {"matrices": 1.0, "emb.weight": 1.0}
    factors, first = perturbed(model, perturbs, 1, [0, 1, 5, 4, 2, 3, 0, 1])
    _, later = perturbed(model, perturbs, 1, [5, 2, 1, 1, 0, 3, 4, 0])
    captured = []

    def outputs(engine):
        state, found = new_state(model, 16), []
        for t, tokens in enumerate(tokens_of(8, 6).T):
            weights = first if t < 3 else later
            found.append(engine.forward(weights, model.arch, tokens, state.rows(slice(8))))
            gc.collect()
        return torch.stack(found), state

    expected, expected_state = outputs(torch_engine)
    with gpu.running(model, factors, 16) as engine:
        if not HAS_GPU:
            engine.capture = lambda run: captured.append(1) or capture_that_keeps_nothing(run)
        found, state = outputs(engine)
    assert HAS_GPU or len(captured) == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(state.wkv, expected_state.wkv, rtol=1e-4, atol=2e-5)


def test_all_numbers_of_rows_work_in_memory_that_is_allocated_once(tmp_path):
    _, model = tiny(tmp_path, 1)
    engine = gpu.GpuEngine(model, None, 16, None)
    pointers = {engine._scratch(rows).work.mixed.data_ptr() for rows in (8, 16, 8)}
    assert len(pointers) == 1
    with pytest.raises(ValueError, match="made for 16 rows at most; got 24"):
        engine._scratch(24)


def test_nothing_is_held_of_a_state_that_another_one_follows(tmp_path):
    """Texts are read group by group, rollouts follow one another: each former state must go."""
    _, model = tiny(tmp_path, 1)
    with gpu.running(model, None, 8) as engine:
        shifts = []
        for _ in range(3):
            state = new_state(model, 8)
            engine.forward(Weights(model.params), model.arch, tokens_of(8, 1)[:, 0], state)
            shifts.append(weakref.ref(state.att_shift))
            del state
            gc.collect()
    assert [shift() is None for shift in shifts] == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_are_those_numbers(tmp_path, dtype):
    """Turned back one matrix at a time; torch's engine does so in blocks."""
    _, model = tiny(tmp_path, 2, dtype=dtype)
    params, scales = dict(model.params), {}
    for name, tensor in model.params.items():
        if int8.is_quantizable(name, tuple(tensor.shape)):
            params[name], scales[name] = int8.quantize(tensor, DEVICE)
    in_8_bits = model._replace(params=params, scales=scales)
    factors = draw_factors(noise_of(model, {"matrices": 1.0}, 1), model, range(3))
    weights = perturb(in_8_bits, factors, torch.tensor([0, 1, 5, 4, 2, 2, 3, 0], device=DEVICE))
    expected, _ = decode(torch_engine, in_8_bits, tokens_of(8, 2), weights)
    assert gpu.is_able(in_8_bits, factors)
    with gpu.running(in_8_bits, factors, 8) as engine:
        found, _ = decode(engine, in_8_bits, tokens_of(8, 2), weights)
    assert (found - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 0.03)
    plain, _ = decode(torch_engine, model, tokens_of(8, 2), Weights(model.params))
    assert (plain - expected).norm() / expected.norm() > 1e-3


class Launches(torch.utils._python_dispatch.TorchDispatchMode):
    """Count what would be launched on a GPU: operations that compute, and kernels."""

    VIEWS = (
        "view",
        "t",
        "slice",
        "select",
        "unbind",
        "_unsafe_view",
        "detach",
        "alias",
        "transpose",
        "expand",
        "empty",
    )

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import GridExecutor  # not before the interpreter is chosen

        super().__init__()
        self.count, run = 0, GridExecutor.__call__
        monkeypatch.setattr(GridExecutor, "__call__", lambda *a, **k: self.kernel(run, *a, **k))

    def kernel(self, run, *args, **options):
        before = self.count
        run(*args, **options)
        self.count = before + 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in self.VIEWS
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(HAS_GPU, reason="counted in the interpreter")
def test_a_perturbed_layer_takes_seventeen_launches(tmp_path, monkeypatch):
    """10 products, one kernel of four more, and 6 around them; plain torch takes 181 operations."""
    counts = []
    for n_layer in (1, 3):
        model = on_device(make_model(tmp_path, n_layer, 64, 48))
        factors, weights = perturbed(model, {"matrices": 1.0}, 1, [0, 1, 5, 4, 2, 2, 3, 0])
        with gpu.running(model, factors, 8) as engine, monkeypatch.context() as patch, Launches(patch) as launches:
            engine.read_(weights, tokens_of(8, 1)[:, 0], new_state(model, 8))
        counts.append(launches.count)
    assert (counts[1] - counts[0]) / 2 <= 17


def test_factors_in_bf16_are_held_once(tmp_path):
    """They become views of the block that the kernels read, with the values that they had."""
    _, model = tiny(tmp_path, 2, dtype=torch.bfloat16)
    factors, weights = perturbed(model, {"matrices": 1.0, "head.weight": 1.0}, 3, [0, 1, 5, 4, 2, 2, 3, 0])
    before = [{name: factor.clone() for name, factor in side.items()} for side in (factors.a, factors.b)]
    expected, _ = decode(torch_engine, model, tokens_of(8, 1), weights)
    for _ in range(2):  # rollouts follow one another
        engine = gpu.GpuEngine(model, factors, 8, None)
        blocks = {noise.block.untyped_storage().data_ptr() for noise in engine.noise}
        for side, values in zip((factors.a, factors.b), before):
            for name, factor in side.items():
                assert torch.equal(factor, values[name])
                assert (factor.untyped_storage().data_ptr() in blocks) == name.startswith("blocks.")
    assert torch.equal(decode(torch_engine, model, tokens_of(8, 1), weights)[0], expected)


def test_completions_equal_the_torch_engine(tmp_path):
    """Sampled tokens differ only where rounding decides between two; here none does."""
    model = on_device(make_model(tmp_path, 1, 64, V))
    factors, _ = perturbed(model, {"matrices": 1.0}, 1, [0])
    requests = requests_of(4, 2, 6)
    plain = rollout(model, requests, GenerationConfig(NEVER, HOT, 8, "torch"), factors)
    found = rollout(model, requests, GenerationConfig(NEVER, HOT, 8, "triton"), factors)
    assert found.completions == plain.completions and found.num_read == plain.num_read


def test_what_the_engine_cannot_run_is_refused(tmp_path, monkeypatch):
    model = on_device(make_model(tmp_path, 1, 64, V))
    assert gpu.is_able(model, None)
    factors, _ = perturbed(model, {"blocks.0.att.x_r": 1.0}, 1, [0])
    assert not gpu.is_able(model, factors)
    half = model._replace(params={name: tensor.half() for name, tensor in model.params.items()})
    assert not gpu.is_able(half, None)
    with pytest.raises(ConfigError, match="engine triton needs a GPU"):
        rollout(model, requests_of(2, 2), GenerationConfig(NEVER, engine="triton"), factors)
    monkeypatch.setattr("triton.__version__", "3.3.1")
    with pytest.raises(ImportError, match=r"from 3\.4 on"):
        runpy.run_path(kernels.__file__)
    monkeypatch.setattr(gpu, "kernels", lambda: None)
    assert not gpu.is_able(model, None)


@pytest.fixture
def nothing_known(monkeypatch):
    monkeypatch.setattr(gpu_trial, "_found", {})
    monkeypatch.setattr(gpu_trial, "_TEXT", 2)  # the interpreter takes its time


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_is_used_by_itself_only_if_it_agrees_with_torch(tmp_path, monkeypatch, nothing_known, dtype):
    _, model = tiny(tmp_path, 1, dtype=dtype)
    factors, _ = perturbed(model, {"matrices": 1.0, "emb.weight": 1.0}, 3, [0])
    assert gpu_trial.reason_against(model, factors) == ""
    monkeypatch.setattr(gpu_trial, "_found", {})
    monkeypatch.setattr(kernels, "square_relu", lambda hidden, noise: hidden.zero_())
    assert "its logits differ from torch's by" in gpu_trial.reason_against(model, factors)


def test_why_the_engine_is_not_used_is_one_sentence(tmp_path, monkeypatch, nothing_known, capsys):
    _, model = tiny(tmp_path, 1)
    factors, _ = perturbed(model, {"blocks.0.att.x_r": 1.0}, 1, [0])
    assert gpu_trial.reason_against(model, factors) == "it has no kernels for these weights or targets"
    monkeypatch.setattr(gpu, "running", lambda *_: 1 / 0)
    assert gpu_trial.reason_against(model, None) == "its kernels cannot be made or run here: division by zero"
    monkeypatch.setattr(layer, "_import_kernels", lambda: (None, None, "No module named 'triton'"))
    monkeypatch.setattr(gpu_trial, "_found", {})
    for _ in range(2):
        assert engines._says_why_not(model, None)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].endswith("several times slower than Triton: No module named 'triton'")


def compiled(*options, cache):
    """Compile all kernels in a process of its own, without the interpreter; return the facts by kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "gpu_compile.py"), *options]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {facts["kernel"]: facts for facts in map(json.loads, done.stdout.splitlines())}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("sm_90", id="sm_90"),
        *(
            pytest.param(o, marks=SLOW)
            for o in ("sm_90 --state fp16", "sm_90 --rank 4", "sm_80", "sm_90 --unperturbed")
        ),
        *(pytest.param(o, marks=SLOW) for o in ("gfx942", "sm_80 --dim 192 --ffn 200 --dtype fp32 --rank 3")),
    ],
)
def test_every_kernel_compiles_for_a_gpu_that_is_not_here(tmp_path, options):
    """And keeps its promises: a head's state is asked for at once, by few instructions, and all fits the registers."""
    found = compiled(*options.split(), cache=tmp_path)
    time_mix = {"_norm_and_mix", "_project_down", "_activate_pairs", "_update_state"}
    channel_mix = {"_norm_and_shift", "_square_relu"}
    loop = {"_choose_tokens", "_choose_texts", "_write_tokens", "_note_tokens", "_admit", "_copy_rows"}
    texts = {"_mix_texts", "_update_texts", "_shift_texts"}
    noise = {"_fill_from_table", "_round_to_bf16", "_move_on_grid"}
    noise |= {"_round_to_fp8"} if "sm_90" in options else set()
    assert found.keys() == time_mix | channel_mix | texts | loop | noise | {"_add_ffn_value"}
    assert not any(facts["spills_bytes"] for facts in found.values())
    update = found["_update_state"]
    assert update["instructions"] * update["warps"] <= 1600
    if options.startswith("sm"):
        assert update["branches"] == 0, "something is decided before the state is loaded"
        assert update["loads_of_16_bytes"] >= (16 if "fp16" in options else 32), "64 x 64 values by 32 threads"
        assert found["_norm_and_mix"]["registers"] <= 80 or "rank" in options, "two programs of 16 warps at a time"
