import os

os.environ["RWKV_V7_ON"] = "1"  # read by the rwkv package when it is imported

import pytest
import reference
import torch
from checkpoints import random_params
from models import KINDS, decode, make_model, random_tokens, written_out

from rwkv_es.cpu import engine as cpu
from rwkv_es.model import int8
from rwkv_es.model.forward import (
    Model,
    draw_factors,
    forward,
    logits,
    new_state,
    perturb,
    with_initial_state,
)
from rwkv_es.model.weights import Weights
from rwkv_es.noise.factors import Noise, select


@pytest.mark.filterwarnings("ignore")  # the package's own
@pytest.mark.parametrize(
    ("n_layer", "n_embd", "n_vocab"), [(3, 128, 512), pytest.param(12, 768, 65536, marks=pytest.mark.slow)]
)
def test_logits_equal_the_rwkv_package(tmp_path, n_layer, n_embd, n_vocab):
    from rwkv.model import RWKV_x070

    model = make_model(tmp_path, n_layer, n_embd, n_vocab)
    client = RWKV_x070(str(tmp_path / "model"), "cpu fp32")
    tokens = random_tokens(8, 24, n_vocab)
    with cpu.running(model, None, 1) as engine:
        by_engine = [decode(model, tokens), decode(model, tokens, engine=engine)]
    for row in range(4):
        state = None
        for t, token in enumerate(tokens[row].tolist()):
            theirs, state = client.forward([token], state)
            for ours in by_engine:
                # fp32 over two orders of summation: the package's own two modes differ by up to 4e-5
                assert (ours[row, t] - theirs).abs().max() <= 5e-5


def test_logits_equal_float64_numpy(tmp_path):
    model = make_model(tmp_path, 3, 128, 512)
    tokens = random_tokens(4, 24, 512)
    ours = decode(model, tokens).double().numpy()
    for row in range(4):
        assert abs(ours[row] - reference.logits(model.params, tokens[row].tolist())).max() <= 1e-4


def test_an_initial_state_is_where_every_row_starts(tmp_path):
    model = with_initial_state(make_model(tmp_path))
    initial = [0.3 * torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    for i in range(2):
        model.params[f"blocks.{i}.att.time_state"].copy_(initial[i])
    tokens = random_tokens(2, 6, 64)
    plain = {name: tensor for name, tensor in model.params.items() if "time_state" not in name}
    for row in range(2):
        expected = reference.logits(plain, tokens[row].tolist(), initial)
        assert abs(decode(model, tokens)[row].double().numpy() - expected).max() <= 1e-4


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_perturbed_row_is_the_model_with_its_perturbation_written_out(tmp_path, kind, rank):
    model = make_model(tmp_path)
    if kind in ("state", "everything"):
        model = with_initial_state(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.params.items()}
    noise = Noise(0, select(shapes, KINDS[kind], rank)).at(step=2, sigma=0.05)
    members = torch.tensor([0, 1, 5, 4, 2, 2, 3, 0])  # 8 rows: with 5, BLAS gives the last one other bits
    tokens = random_tokens(8, 12, 64)
    tokens[7] = tokens[0]
    ours = decode(model, tokens, perturb(model, draw_factors(noise, model, range(3)), members))
    unperturbed = decode(model, tokens)
    for row, member in enumerate(members.tolist()):
        params = written_out(model, noise, member)
        has_state = "blocks.0.att.time_state" in params
        initial = [params.pop(f"blocks.{i}.att.time_state") for i in range(2)] if has_state else None
        expected = reference.logits(params, tokens[row].tolist(), initial)
        found = ours[row].double().numpy()
        assert abs(found - expected).max() / abs(expected).max() <= 1e-4
        assert (found.argmax(-1) == expected.argmax(-1)).all()
        effect = (ours[row] - unperturbed[row]).abs().max()
        assert effect > 1e-3, "a perturbation without effect would pass the comparison"
    assert torch.equal(ours[7], ours[0])


def test_factors_of_a_later_range_of_directions_are_found(tmp_path):
    model = make_model(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.params.items()}
    noise = Noise(0, select(shapes, {"matrices": 1.0}, 1)).at(0, 0.05)
    tokens, members = random_tokens(8, 4, 64), torch.tensor([6, 9] * 4)
    whole = decode(model, tokens, perturb(model, draw_factors(noise, model, range(5)), members))
    part = decode(model, tokens, perturb(model, draw_factors(noise, model, range(3, 5)), members))
    assert torch.equal(whole, part)


def test_bf16_weights_keep_an_fp32_state(tmp_path):
    model = make_model(tmp_path, dtype=torch.bfloat16)
    state = new_state(model, 2)
    assert state.wkv.dtype == torch.float32 and state.att_shift.dtype == torch.bfloat16
    tokens = random_tokens(2, 12, 64)
    exact = decode(Model({name: tensor.float() for name, tensor in model.params.items()}, model.arch), tokens)
    relative = (decode(model, tokens) - exact).norm() / exact.norm()
    assert relative < 0.06  # bf16 carries 8 bits: errors of 0.002 a rounding, hundreds of them in a row


@pytest.mark.parametrize("is_int8", [False, True])
def test_logits_of_bf16_weights_are_not_rounded_to_bf16(is_int8):
    """Products of bf16 numbers are exact in fp32; near 20 bf16 knows eighths only."""
    head, x = random_params(1, 64, 48)["head.weight"].bfloat16(), 20 * torch.randn(8, 64).bfloat16()
    matrix = int8.quantize(head) if is_int8 else int8.Quantized(head, None)
    weights = Weights({"head.weight": matrix.values}, scales={"head.weight": matrix.scale} if is_int8 else {})
    exact = x.double() @ (matrix.values * matrix.scale[:, None] if is_int8 else head).double().t()
    found = weights.logits(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


def test_the_forward_pass_knows_no_device(tmp_path):
    """On the meta device nothing is computed, but every operation must accept tensors that are not on the CPU."""
    model = make_model(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.params.items()}
    noise = Noise(0, select(shapes, {"*": 1.0}, 2)).at(0, 0.05)
    factors = draw_factors(noise, model, range(2))
    factors = factors._replace(
        a={name: a.to("meta") for name, a in factors.a.items()}, b={name: b.to("meta") for name, b in factors.b.items()}
    )
    meta = Model({name: tensor.to("meta") for name, tensor in model.params.items()}, model.arch)
    tokens = torch.zeros(8, dtype=torch.int64, device="meta")
    state = new_state(meta, 8)
    weights = perturb(meta, factors, tokens)
    out = logits(weights, forward(weights, meta.arch, tokens, state))
    assert out.device.type == "meta" and out.shape == (8, 64)
