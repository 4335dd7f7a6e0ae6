"""The closed form of what a process holds: by hand for one shape, and against the tensors that are really made."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import random_params

from rwkv_es.cpu import engine as cpu
from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.memory import Load, Memory, most_slots, needed, targets_of
from rwkv_es.engine.rollout import _Rows
from rwkv_es.engine.scheduler import Request
from rwkv_es.engine.stops import Stops
from rwkv_es.es.update import Rule, Updater
from rwkv_es.model.forward import Model, draw_factors, new_state, with_initial_state
from rwkv_es.model.int8 import is_quantizable, quantize
from rwkv_es.noise.factors import Noise
from rwkv_es.noise.targets import UNUSED
from rwkv_es.pretrained.checkpoint import Arch

ARCH = Arch(2, 128, 2, 64, 1000, 512, 8, 8, 8, 16)
BIG = Arch(32, 4096, 64, 64, 65536, 16384, 128, 128, 96, 480)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_a_small_model_by_hand():
    # Block 0: 10 vectors, r_k, ln_x and x_k of the FFN; w, a and g pairs; four C x C; key and value of the FFN.
    block0 = 10 * 128 + 128 + 256 + 128 + 2 * 128 * (8 + 8 + 16) + 4 * 128 * 128 + 2 * 512 * 128
    assert block0 == 206_592
    entries = 2 * 1000 * 128 + 6 * 2 * 128 + block0 + block0 + 128 + 2 * 128 * 8  # block 1 has v0, v1, v2 too
    assert entries == 672_896
    # Rank 2: 2 (p + q) values a matrix and direction; block 1 has v1 and v2 too.
    values = 2 * 2 * (4 * 256 + 2 * 640 + 2 * 136 + 2 * 136 + 2 * 144) + 2 * (2 * 136)
    assert values == 13_088
    # 20 slots are 24 rows; 12 members in 2 processes are 3 directions each; 12 rows a thread are 16.
    load = Load(slots=20, population=12, processes=2, threads=2)
    found = needed(ARCH, targets_of(ARCH, {"matrices": 1.0}, 2), load)
    assert found == Memory(
        program=227_000_000,
        weights=672_896 * 4,
        masters=0,
        optimizer=0,
        factors=3 * 13_088 * 4,
        states=24 * 2 * (2 * 64 * 64 * 4 + 2 * 128 * 4),
        saved=0,
        packed=3 * 13_088 * 2,
        scratch=2 * 16 * (14 * 128 + 512 + 40) * 4 + 2 * 19 * 128 * 4,
        logits=24 * 1000 * 4,
        update=5 * 512 * 128 * 4 + 4 * 6 * (640 * 2) * 4,
        host=0,
    )
    assert found.peak == 227_000_000 + 2_691_584 + 157_056 + 1_622_016 + 78_528 + 319_488 + 96_000


@pytest.mark.parametrize(
    "targets", [{"matrices": 1.0}, {"matrices": 1.0, "vectors": 1.0, "head.weight": 2.0}, {"state": 1.0}]
)
@pytest.mark.parametrize(("dtype", "quantize_as"), [("fp32", "none"), ("bf16", "none"), ("bf16", "int8")])
@pytest.mark.parametrize("master", ["fp32", "stochastic"])
def test_the_parts_are_those_of_the_tensors_that_are_made(targets, dtype, quantize_as, master):
    params = {name: w.to(DTYPES[dtype]) for name, w in random_params(2, 128, 1000).items()}
    params = {name: w for name, w in params.items() if name not in UNUSED}
    scales = {}
    for name in [n for n, w in params.items() if quantize_as == "int8" and is_quantizable(n, tuple(w.shape))]:
        params[name], scales[name] = quantize(params[name])
    model = Model(params, ARCH, scales, torch.float16)
    if "state" in targets:
        model = with_initial_state(model)
    noise = Noise(0, targets_of(ARCH, targets, 3))
    assert set(noise.targets) <= set(model.params)
    updater = Updater(model, list(noise.targets), Rule(master=master), {})
    factors = draw_factors(noise.at(0, 0.1), model, range(5))
    shaped = [factors.b[n] for n, t in noise.targets.items() if not t.is_full]  # full noise has a B of ones

    load = Load(16, 10, dtype=dtype, quantize=quantize_as, state_dtype="fp16", master=master, engine="torch")
    found = needed(ARCH, noise.targets, load)
    assert found.weights == num_bytes([*model.params.values(), *scales.values()])
    assert found.masters == num_bytes(updater.master.values())
    assert found.factors == num_bytes([*factors.a.values(), *shaped])
    assert found.states == num_bytes(new_state(model, 16))
    assert found.logits == 16 * 1000 * 4


def test_the_factors_that_the_cpu_kernels_read_are_those_that_they_are_given():
    """Matrices' and vectors' noise, a second time in bf16."""
    model = Model({name: w for name, w in random_params(2, 128, 1000).items() if name not in UNUSED}, ARCH)
    noise = Noise(0, targets_of(ARCH, {"matrices": 1.0, "blocks.*.ln1.*": 1.0, "blocks.*.att.k_k": 1.0}, 3))
    factors = draw_factors(noise.at(0, 0.1), model, range(5))
    with cpu.running(model, factors) as engine:
        held = sum(part.nbytes for layer in engine.noise for part in (layer.block, layer.vectors))
    assert needed(ARCH, noise.targets, Load(16, 10, engine="numba")).packed == held


def test_states_of_episodes_that_wait_are_those_that_a_rollout_makes():
    model, decoding = (
        Model(random_params(2, 128, 1000), ARCH),
        GenerationConfig(Stops(-1, (), np.zeros(1000, bool), []), slots=16),
    )
    rows = _Rows(model, [Request(-1, i, (1, 2), 4) for i in range(64)], decoding, None, has_turns=True)
    load, targets = Load(16, 10), targets_of(ARCH, {"matrices": 1.0}, 1)
    waiting = needed(ARCH, targets, load._replace(has_turns=True))
    assert waiting.saved == num_bytes(rows.kept) > 0
    assert waiting.peak - needed(ARCH, targets, load).peak == waiting.saved


def test_reading_references_holds_logits_twice_more_in_double_precision():
    """fp32 logits, the same as float64, and what log_softmax makes of these; beside sampled answers the larger counts."""
    load, targets = Load(16, 10, has_references=True), targets_of(ARCH, {"matrices": 1.0}, 1)
    assert needed(ARCH, targets, load).logits == 16 * 1000 * (4 + 8 + 8)
    sampled = [
        needed(ARCH, targets, load._replace(temperature=1.0, has_references=is_read)) for is_read in (False, True)
    ]
    assert sampled[0] == sampled[1]


def test_on_a_gpu_the_masters_are_the_16_bits_that_the_weights_lack():
    load = Load(1024, 1024, dtype="bf16", engine="triton", device="cuda")
    found = needed(BIG, targets_of(BIG, {"matrices": 1.0}, 1), load)
    assert 2 * 6.5e9 < found.masters < 2 * 7.2e9
    assert found.host > 4 * 7.1e9  # a snapshot holds every weight in fp32
    assert found.states == 1024 * 32 * (4096 * 64 * 4 + 2 * 4096 * 2)


@pytest.mark.parametrize("rows_per_member", [0, 1, 8])
def test_the_most_slots_fit_and_eight_more_do_not(rows_per_member):
    targets, load, free = (
        targets_of(BIG, {"matrices": 1.0}, 1),
        Load(1, 64, dtype="bf16", engine="triton", device="cuda"),
        84 * 10**9,
    )
    slots, found = most_slots(free, BIG, targets, load, rows_per_member)

    def peak(slots):
        members = slots // rows_per_member if rows_per_member else 64
        return needed(BIG, targets, load._replace(slots=slots, population=members + members % 2)).peak

    assert slots % 8 == 0
    assert found.peak == peak(slots) <= free < peak(slots + 8)


def test_no_slots_fit_where_the_weights_do_not():
    slots, found = most_slots(10**9, BIG, targets_of(BIG, {"matrices": 1.0}, 1), Load(1, 64))
    assert slots == 0
    assert found.peak > 10**9


def test_thousands_of_7b_generations_fit_eight_gpus_of_80_gb():
    load = Load(1, 2, processes=8, dtype="bf16", engine="triton", device="cuda")
    slots, _ = most_slots(83 * 10**9, BIG, targets_of(BIG, {"matrices": 1.0}, 1), load, rows_per_member=1)
    assert 8 * slots >= 8192


def test_it_needs_no_torch():
    code = "import sys, rwkv_es.engine.memory; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
