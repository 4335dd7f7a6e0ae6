"""Products in fp8: against e4m3's values written out, in the engines, and through a run."""

import json

import pytest
import torch
from interpreted import DEVICE, HAS_GPU, in_the_interpreter, noise_kernels, on_device  # noqa: F401
from models import make_model, random_tokens
from perturbed import decode, noise_of

from rwkv_es.cli import main
from rwkv_es.engine.memory import Load, needed, targets_of
from rwkv_es.gpu import engine as gpu
from rwkv_es.model import batch, fp8
from rwkv_es.model import forward as torch_engine
from rwkv_es.model.forward import draw_factors, perturb, unperturbed
from rwkv_es.model.layout import expected_shapes
from rwkv_es.pretrained.header import SIZES
from rwkv_es.system.errors import ConfigError

E4M3 = sorted({s * m * 2.0**e for e in range(-6, 9) for m in (1 + i / 8 for i in range(8)) for s in (1, -1)})
E4M3 = torch.tensor([v for v in E4M3 if abs(v) <= 448] + [s * i * 2.0**-9 for i in range(8) for s in (1, -1)])
TINY = (
    "--model tiny --dtype bf16 --quantize fp8 --population 8 --prompts 2 --eval-size 2 --max-new-tokens 6 --threads 1"
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_products_are_those_of_the_nearest_values_of_e4m3():
    """Of values as near as the nearest: at a tie, a scale in fp32 may decide for either."""
    x, w = random(9, 48), random(20, 48, seed=1)
    w[3] *= 1e-3  # a row of small values loses no more than others
    w[4] = 0
    written = []
    for matrix in (x, w):
        held = fp8.rounded(matrix)
        values, scaled = held.values.double(), matrix.double() / held.scale.double()[:, None]
        assert held.values.element_size() == 1 and torch.isin(values, E4M3.double()).all()
        away = (scaled[:, :, None] - E4M3.double()).abs().amin(-1)
        torch.testing.assert_close((scaled - values).abs(), away, rtol=1e-4, atol=1e-5)
        assert torch.equal(values.abs().amax(1), torch.tensor([448.0 * bool(row.any()) for row in matrix]).double())
        written.append(values * held.scale.double()[:, None])
    torch.testing.assert_close(fp8.times(x, held).double(), written[0] @ written[1].t(), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("width", [64, 200])
def test_the_kernel_rounds_like_plain_torch(monkeypatch, width):
    """In the interpreter, whose own rounding to fp8 loses carries, values that need none."""
    x = random(7, width)
    if not HAS_GPU:
        places = torch.randint(len(E4M3), (7, width), generator=torch.Generator().manual_seed(0))
        x = E4M3[places] * 2.0 ** torch.arange(-3, 4)[:, None]
        x[:, 5] = 448 * 2.0 ** torch.arange(-3, 4)
    x[2] = 0
    found = []
    for kernels in (noise_kernels, None):
        monkeypatch.setattr(fp8, "gpu_kernels", lambda device, kernels=kernels: kernels)
        found.append(fp8.rounded(x.to(DEVICE, torch.bfloat16)))
    assert torch.equal(found[0].scale, found[1].scale)
    assert torch.equal(found[0].values.float(), found[1].values.float())


def test_the_gpu_engine_and_plain_torch_multiply_alike(tmp_path):
    """And differ from bf16 by what fp8 takes, no more; perturbations and head stay as they are."""
    plain = on_device(make_model(tmp_path, 2, 64, 48, dtype=torch.bfloat16))
    model = plain._replace(is_fp8=True)
    factors = draw_factors(noise_of(model, {"matrices": 1.0}, 2), model, range(4))
    members = perturb(model, factors, torch.tensor([0, 1, 5, 4, 2, 2, 3, 7], device=DEVICE))
    tokens = random_tokens(8, 6, 48).to(DEVICE)
    expected, _ = decode(torch_engine, model, tokens, members)
    with gpu.running(model, factors, 8) as engine:
        found, _ = decode(engine, model, tokens, members)
        large = {m.rounded is not None for layer in engine.layers for m in layer.matrices if m is not None}
    exact, _ = decode(torch_engine, plain, tokens, members._replace(is_fp8=False))
    assert large == {True, False}, "the low-rank parameters are not rounded"
    assert 0.005 < (expected - exact).norm() / exact.norm() < 0.1
    assert (found - expected).norm() / expected.norm() < 0.06


def test_rows_have_the_same_bits_in_any_company_or_it_is_found_out(tmp_path):
    """What is examined is the product that is made."""
    model = make_model(tmp_path, 1, 64, 48, dtype=torch.bfloat16)._replace(is_fp8=True)
    made = [p for p in batch._products(model, False) if "ffn.key" in p.name]
    x = random(16, 64)
    assert made and all(torch.equal(p.make(x)[:, :8], unperturbed(model).linear(x, p.name)[:, :8]) for p in made)


def test_a_run_in_fp8_learns_goes_on_and_replays(tmp_path, capsys):
    run = f"--run {tmp_path / 'run'} --sigma 0.02 --lr 0.05 --temperature 1"
    assert main(f"train {TINY} {run} --steps 2".split()) == 0
    assert main(f"train {TINY} {run} --steps 3".split()) == 0
    assert main(["replay", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "rewards" in line] == [0, 1, 2]


@pytest.mark.parametrize("command", ["train --steps 1", "eval", "generate hi"])
def test_fp8_is_refused_where_it_cannot_be(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["tiny"] if command == "eval" else ["--model", "tiny"]
    assert main([*command.split(), *model, "--quantize", "fp8", "--dtype", "fp32"]) == 2
    assert "quantize fp8 needs weights in bf16; try --dtype bf16" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match="H100 or newer"):
        fp8.refuse(torch.device("cuda"), torch.bfloat16)


def test_the_copy_is_in_the_plan():
    """A byte for each entry of the blocks' large matrices."""
    arch = SIZES["1.5b"]
    large = [s for name, s in expected_shapes(arch).items() if name.startswith("blocks.") and name.endswith(".weight")]
    entries = sum(s[0] * s[1] for s in large if len(s) == 2)
    targets = targets_of(arch, {"matrices": 1.0}, 1)
    load = Load(8, 2, dtype="bf16", engine="triton", device="cuda", master="stochastic")
    assert needed(arch, targets, load._replace(quantize="fp8")).scratch - needed(arch, targets, load).scratch == entries
