"""The roofline: operations and bytes by hand, published facts of the models, and the rates of this CPU."""

import pytest

from rwkv_es.engine.memory import Load, targets_of
from rwkv_es.model.layout import Arch
from rwkv_es.planning.devices import GPUS, Device, available_memory, devices_of, here
from rwkv_es.planning.speed import Work, Workload, tick, times, update, work
from rwkv_es.pretrained.header import SIZES
from rwkv_es.system.errors import ConfigError

SMALL = Arch(2, 128, 2, 64, 1000, 512, 8, 8, 8, 16)
SIMPLE = Device("simple", "cpu", 10**9, flops=1e9, bandwidth=1e8, is_measured=True)


@pytest.mark.parametrize(
    ("size", "gflop", "megabytes"), [("1.5b", 2.79, 12.8), ("7.2b", 13.86, 34.1), ("13.3b", 25.99, 65.0)]
)
def test_operations_and_state_of_a_row_are_the_models_known_ones(size, gflop, megabytes):
    arch = SIZES[size]
    done = work(arch, targets_of(arch, {"matrices": 1.0}, 1), Load(1, 2, dtype="bf16"), 1)
    assert (done.block_flops + done.head_flops) / 1e9 == pytest.approx(gflop, rel=0.01)
    factors = sum(t.num_values for t in targets_of(arch, {"matrices": 1.0}, 1).values()) * 2
    activations = arch.n_layer * 40 * arch.n_embd * 2
    assert (done.other_bytes - factors - activations) / 2e6 == pytest.approx(megabytes, rel=0.01)


def test_a_tick_by_hand():
    done = work(SMALL, targets_of(SMALL, {"matrices": 1.0}, 2), Load(16, 4), 8)
    block0 = 4 * 128 * 128 + 2 * 512 * 128 + 2 * 128 * (8 + 8 + 16)
    assert done == Work(
        block_flops=2 * 16 * (2 * block0 + 2 * 128 * 8),
        head_flops=2 * 16 * 1000 * 128,
        weight_bytes=4 * (2 * block0 + 2 * 128 * 8 + 1000 * 128),
        other_bytes=2 * 16 * 2 * (128 * 64 * 4 + 2 * 128 * 4) + 1 * 13_088 * 4 + 16 * 2 * 40 * 128 * 4,
        logit_bytes=2 * 16 * 1000 * 4,
    )
    found = tick(Work(2e9, 1e9, 1e7, 3e7, 1e7), SIMPLE, "numba")
    assert found.products == pytest.approx(2.0)
    assert found.others == pytest.approx(0.3)
    assert found.reading == pytest.approx(2.3)
    assert found.writing == pytest.approx(2.3 + 1.0 + 0.1)
    few_rows = tick(Work(2e6, 1e6, 1e9, 0, 0), SIMPLE._replace(is_measured=False), "numba")  # bound by the weights
    head = tick(Work(2e9, 1e9, 1e7, 3e7, 1e7), SIMPLE._replace(head_flops=4e9), "numba").head  # the measured rate
    assert head == pytest.approx(0.25)
    assert few_rows.products + few_rows.head == pytest.approx(10.0)


def test_a_step_by_hand():
    targets, load = targets_of(SMALL, {"matrices": 1.0}, 1), Load(16, 8, processes=2)
    asked = Workload(answers=64, prompt_tokens=5, new_tokens=3, rows_per_member=8)
    one = tick(work(SMALL, targets, load, 8), SIMPLE, "numba")
    found = times(SMALL, targets, load, asked, SIMPLE._replace(updates=411_648.0))
    assert found.generate_s == pytest.approx(2 * (4 * one.reading + 3 * one.writing))  # 32 answers in 16 slots
    assert found.tokens_per_s == pytest.approx(64 * 8 / found.generate_s)
    assert found.update_s == pytest.approx(1.0)  # all matrices of the blocks: 204,800 + 206,848 weights


def test_a_larger_population_takes_a_longer_update():
    targets = targets_of(SIZES["7.2b"], {"matrices": 1.0}, 1)
    few, many = (update(targets, Load(1, n, dtype="bf16"), GPUS["h100-80"]) for n in (1024, 8192))
    assert few < many < 8 * few


def test_devices_are_read_as_they_are_written():
    assert devices_of("8xh100-80") == (8, GPUS["h100-80"])
    assert devices_of("H200-141") == (1, GPUS["h200-141"])
    assert devices_of("2 x 24gb")[1].memory == 24 * 10**9
    assert devices_of("24GB") == (1, Device("GPU of 24 GB", "cuda", 24 * 10**9))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("h100", "did you mean h100-80"),
        ("0xh100-80", "one device or more"),
        ("", "may be l4-24"),
        ("8", "'8' is not in the table"),
    ],
)
def test_other_devices_are_refused(spec, words):
    with pytest.raises(ConfigError, match=words):
        devices_of(spec)


def test_the_table_is_what_its_names_say():
    for name, gpu in GPUS.items():
        assert gpu.memory == pytest.approx(int(name.split("-")[1]) * 1e9, rel=0.08)
        assert 5e10 * 1e3 < gpu.flops < 2e15
    assert GPUS["h100-80"].flops == pytest.approx(790e12, rel=0.01)
    assert GPUS["h200-141"].bandwidth == pytest.approx(4.3e12, rel=0.01)


def test_this_machines_gpus_are_found_by_nvidia_smi(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA H100 80GB HBM3, 81559'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    count, device = here()
    assert (count, device.kind, device.flops) == (2, "cuda", GPUS["h100-80"].flops)
    assert here("cpu")[1].kind == "cpu"
    tool.write_text("#!/bin/sh\necho 'NVIDIA Something 1, 4000'\n")
    assert here() == (1, Device("NVIDIA Something 1", "cuda", 4000 << 20))
    for name, memory, known in [("NVIDIA L40S", 46068, "l40s-48"), ("NVIDIA A100-SXM4-80GB", 81251, "a100-80")]:
        tool.write_text(f"#!/bin/sh\necho '{name}, {memory}'\n")
        assert here()[1].bandwidth == GPUS[known].bandwidth
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert here()[1].kind == "cpu"
    assert available_memory() > 1 << 20


def test_products_are_measured_as_the_fused_engine_makes_them(monkeypatch):
    """Its threads share out the rows while torch has one thread: torch's own wait spinning, for long on a busy machine."""
    import torch

    from rwkv_es.planning import benchmark

    seen, products = [], benchmark._products
    monkeypatch.setattr(
        benchmark,
        "_products",
        lambda model, rows: (seen.append((rows, torch.get_num_threads())), products(model, rows)),
    )
    before, targets = torch.get_num_threads(), targets_of(SMALL, {"matrices": 1.0}, 1)
    try:
        benchmark.measure(SMALL, targets, Load(72, 8, engine="numba", threads=2), 2, Device("this CPU", "cpu", 10**9))
        fused = set(seen)
        seen.clear()
        benchmark.measure(SMALL, targets, Load(72, 8, engine="torch", threads=2), 2, Device("this CPU", "cpu", 10**9))
    finally:
        torch.set_num_threads(before)
    assert fused == {(40, 1), (32, 1)}
    assert set(seen) == {(72, 2)}


def test_measured_rates_give_back_the_time_that_was_measured():
    from rwkv_es.planning.benchmark import measure

    targets = targets_of(SMALL, {"matrices": 1.0}, 1)
    load = Load(16, 8, engine="torch", threads=1)
    found = measure(SMALL, targets, load, 2, Device("this CPU", "cpu", 10**9))
    assert found.is_measured
    assert min(found.flops, found.bandwidth, found.head_flops, found.updates) > 0
    one = tick(work(SMALL, targets, load, 2), found, "torch")
    assert 1e-6 < one.products < 1 and 1e-6 < one.others < 1 and 1e-6 < one.head < 1
