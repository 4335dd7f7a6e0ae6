"""What an ES step holds beside weights, states and factors stays bounded, whatever the size of the tensors."""

import ctypes
import gc
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import random_params
from places import ROOT

from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.rollout import _Rows
from rwkv_es.engine.scheduler import Move, Request
from rwkv_es.engine.stops import Stops
from rwkv_es.es.update import Rule, Updater, checksum, gradient
from rwkv_es.model import int8
from rwkv_es.model.forward import Model, draw_factors
from rwkv_es.noise.factors import Noise, select
from rwkv_es.pretrained import checkpoint
from rwkv_es.pretrained.checkpoint import Arch

SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))
from memory_step import Peak, factors_bytes, rss  # noqa: E402

pytestmark = [
    pytest.mark.measures_memory,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the memory in use from Linux's /proc"),
]
MB = 1 << 20
HEAP = ctypes.CDLL(None)  # the process's own libraries: glibc's malloc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
SHAPE = (24576, 2048)  # 96 MB in bf16
ARCH = Arch(1, 2048, 32, 64, 24576, 8192, 64, 64, 32, 128)


@pytest.fixture(autouse=True, scope="module")
def tensors_outside_of_the_heap():
    """What is left in the heap is of no use to them. Later tests would take twice their time: then as glibc ends by itself."""
    HEAP.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    yield
    HEAP.mallopt(_M_MMAP_THRESHOLD, 32 * MB)
    HEAP.mallopt(_M_TRIM_THRESHOLD, 64 * MB)


def extra(call):
    """Return how much memory a call takes at its worst, in bytes."""
    gc.collect()
    HEAP.malloc_trim(0)  # what others left in the heap is not given back meanwhile
    peak = Peak()
    kept = call()
    peak.lap("call")
    del kept
    return peak.laps["call"] - peak.start


def make(kind):
    """Return a model of one large matrix, and its noise."""
    weight = torch.empty(SHAPE, dtype=torch.float32 if kind == "fp32" else torch.bfloat16)
    weight.copy_(torch.linspace(-1, 1, SHAPE[1]))
    params, scales = {"head.weight": weight, "ln_out.weight": torch.ones(2048, dtype=weight.dtype)}, {}
    if kind == "int8":
        params["head.weight"], scales["head.weight"] = int8.quantize(weight)
    noise = Noise(0, select({"head.weight": SHAPE}, {"head.weight": 1.0}, 1)).at(0, 0.01)
    return Model(params, ARCH, scales), noise, weight


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_an_update_holds_a_few_slabs_and_no_copy_of_the_matrix(kind, decay):
    model, noise, base = make(kind)
    updater = Updater(model, ["head.weight"], Rule(master="stochastic", weight_decay=decay), {"head.weight": base})
    updater.step(noise, torch.linspace(-1, 1, 8), lr=10.0)  # compiles kernels
    before = model.params["head.weight"][:8].clone()
    taken = extra(lambda: updater.step(noise, torch.linspace(-1, 1, 8), lr=10.0))
    assert not torch.equal(model.params["head.weight"][:8], before)
    assert taken < 100 * MB  # six slabs of 16 MB; a single fp32 copy is 192 MB
    assert updater.weights() is model.params


@pytest.mark.bits
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_slabs_change_no_bit(kind, monkeypatch):
    rule, fitness = Rule(master="stochastic", weight_decay=0.5), torch.linspace(-1, 1, 300)
    sums = []
    for entries in (1 << 30, 1 << 16, 200):
        monkeypatch.setattr("rwkv_es.es.update._ENTRIES_PER_SLAB", entries)
        weight = torch.linspace(-1, 1, 1000 * 24).reshape(1000, 24)
        weight = weight if kind == "fp32" else weight.bfloat16()
        base = {"head.weight": weight.clone()}
        params, scales = {"head.weight": weight, "ln_out.weight": torch.ones(24, dtype=weight.dtype)}, {}
        if kind == "int8":
            params["head.weight"], scales["head.weight"] = int8.quantize(weight)
        noise = Noise(0, select({"head.weight": (1000, 24)}, {"head.weight": 1.0}, 2)).at(3, 0.01)
        Updater(Model(params, ARCH, scales), ["head.weight"], rule, base).step(noise, fitness, lr=0.1)
        sums.append(checksum(params))
    assert sums[0] == sums[1] == sums[2]


@pytest.mark.bits
def test_some_rows_of_a_gradient_are_those_of_the_whole():
    noise = Noise(0, select({"head.weight": (64, 24)}, {"head.weight": 1.0}, 2)).at(3, 0.01)
    fitness = torch.linspace(-1, 1, 300)
    assert torch.equal(
        gradient(noise, "head.weight", fitness, slice(16, 40)), gradient(noise, "head.weight", fitness)[16:40]
    )


def test_a_checksum_and_a_snapshot_copy_nothing(tmp_path):
    model, _, _ = make("bf16")
    assert extra(lambda: checksum(model.params)) < 40 * MB
    assert extra(lambda: checkpoint.save(tmp_path / "model.pth", model.params)) < 40 * MB


def test_int8_matrices_are_made_and_read_a_block_of_rows_at_a_time():
    _, _, weight = make("bf16")
    taken = extra(lambda: int8.quantize(weight))
    assert weight.numel() <= taken < weight.numel() + 80 * MB  # an fp32 copy would be 4 * weight.numel()
    matrix, x = int8.quantize(weight), torch.ones(8, SHAPE[1])
    assert extra(lambda: int8.linear(x, matrix)) < 20 * MB
    assert extra(lambda: int8.moved(matrix.values, weight)) < 3 * weight.numel() + 80 * MB  # fp32 would be 4 times


def test_factors_are_cast_one_tensor_at_a_time():
    names = {f"blocks.{i}.ffn.key.weight": (16384, 4096) for i in range(24)}
    noise = Noise(0, select(names, {"matrices": 1.0, "*": 1.0}, 1)).at(0, 0.01)
    model = Model({"ln_out.weight": torch.ones(4096, dtype=torch.bfloat16)}, ARCH)
    held = factors_bytes(draw_factors(noise, model, range(64)))
    assert extra(lambda: draw_factors(noise, model, range(64))) < 1.25 * held


def test_a_file_that_torch_may_not_map_is_mapped_all_the_same(tmp_path, monkeypatch):
    params = random_params(2, 64, 32, dtype=torch.bfloat16)
    checkpoint.save(tmp_path / "model.pth", params)
    load = torch.load

    def refuse(path, *args, mmap=False, **options):
        if mmap:
            raise RuntimeError(f"unable to mmap 26539080305 bytes from file <{path}>: Cannot allocate memory (12)")
        return load(path, *args, **options)

    monkeypatch.setattr(torch, "load", refuse)
    found, _ = checkpoint.load(tmp_path / "model.pth")
    assert list(found) == list(params)
    assert all(found[name].dtype == w.dtype and torch.equal(found[name], w) for name, w in params.items())


def test_the_script_measures_a_whole_step(tmp_path):
    def script(*arguments):
        command = [sys.executable, str(SCRIPTS / "memory_step.py"), str(tmp_path / "model.pth"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    script("--make", "--layers", "2", "--dim", "256", "--ranks", "32", "32", "16", "64")
    found = json.loads(script("--population", "4", "--prompts", "1", "--max-new-tokens", "2"))
    assert found["weights_bytes"] == sum(w.numel() * 2 for w in checkpoint.load(tmp_path / "model.pth")[0].values())
    assert found["state_bytes"] == 8 * 2 * (4 * 64 * 64 * 4 + 2 * 256 * 2)
    assert found["step_rms_per_sigma"] > 0
    needed = found["weights_bytes"] + found["state_bytes"] + found["factors_bytes"]
    assert found["needed_bytes"] == needed
    assert needed < found["peak_bytes"] - found["before_loading_bytes"] < needed + 200 * MB


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--dtype", "bf16", "--population", "64", "--prompts", "4"),
        ("--dtype", "bf16", "--master", "fp32", "--population", "16", "--prompts", "2"),
        ("--dtype", "fp32", "--engine", "torch", "--population", "32", "--prompts", "2", "--optimizer", "adam"),
        ("--dtype", "bf16", "--quantize", "int8", "--population", "32", "--prompts", "2", "--temperature", "1"),
    ],
)
def test_a_step_holds_what_was_planned(tmp_path, options):
    def script(*arguments):
        command = [sys.executable, str(SCRIPTS / "memory_step.py"), str(tmp_path / "model.pth"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    script("--make", "--layers", "12", "--dim", "768", "--ranks", "64", "64", "32", "128")
    found = json.loads(script(*options, "--max-new-tokens", "2"))
    assert abs(found["planned_over"]) < 0.1


@pytest.mark.slow
def test_a_plan_is_compared_with_the_step_itself(tmp_path):
    def script(name, *arguments):
        command = [sys.executable, str(SCRIPTS / name), str(tmp_path / "model.pth"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    script("memory_step.py", "--make", "--layers", "12", "--dim", "768", "--ranks", "64", "64", "32", "128")
    options = ("--dtype", "bf16", "--population", "32", "--prompts", "2", "--max-new-tokens", "4")
    found = json.loads(script("check_plan.py", *options, "--turns", "1"))
    assert abs(found["memory"] - 1) < 0.1
    assert 0.4 < found["time"] < 2.5  # seconds of a machine that others may share; the log has closer figures


def test_rows_that_move_are_copied_a_layer_at_a_time():
    params = random_params(8, 256, 64)
    model = Model(params, Arch(8, 256, 4, 64, 64, 1024, 8, 8, 8, 16))
    requests = [Request(-1, i, (1, 2), 4) for i in range(64)]
    decoding = GenerationConfig(Stops(-1, (), np.zeros(64, bool), []), slots=64)
    rows = _Rows(model, requests, decoding, None, has_turns=False)
    moves = [Move(32 + i, i) for i in range(32)]
    taken = extra(lambda: rows.move(moves))
    assert taken < 8 * MB  # half of the states is 16.8 MB


def test_the_measurement_sees_memory_that_is_held_for_a_moment():
    assert extra(lambda: torch.ones(50 * MB, dtype=torch.uint8).sum()) >= 50 * MB
    assert rss("VmHWM") >= rss("RssAnon")
