import numpy as np
import pytest
import torch

from rwkv_es.noise import factors as noise_module
from rwkv_es.noise.factors import Noise, hash_key, normal_table, philox, select, sign, table_values, uniform
from rwkv_es.system.errors import ConfigError

SHAPES = {
    "emb.weight": (64, 128),
    "blocks.0.att.v1": (128, 16),
    "blocks.0.att.x_r": (1, 1, 128),
    "blocks.0.att.r_k": (2, 64),
    "blocks.1.att.v1": (128, 16),
    "blocks.1.att.w2": (16, 128),
    "blocks.1.att.key.weight": (128, 128),
    "blocks.1.att.ln_x.bias": (128,),
    "blocks.1.att.time_state": (2, 64, 64),
    "head.weight": (64, 128),
}
FULL = 0xFFFFFFFF


def step_noise(seed=0, step=0, rank=1, targets=None):
    return Noise(seed, select(SHAPES, targets or {"*": 1.0}, rank)).at(step, sigma=0.1)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([FULL] * 4, (FULL, FULL), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        # The third known answer of the Random123 distribution (kat_vectors): digits of pi.
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert philox(torch.tensor([counter]), key).tolist() == [expected]


def test_table_is_standard_normal_and_exact_in_bf16():
    table = normal_table()
    assert torch.equal(table, table.bfloat16().float())
    assert len(table.unique()) == 256
    assert torch.equal(table, -table.flip(0))
    assert table.square().mean().item() == pytest.approx(1, abs=2e-4)
    assert (table**4).mean().item() == pytest.approx(2.92, abs=0.01)  # a normal's 3, less the cut tails


def test_golden_values():
    """The noise of a run is part of its format: a ledger can be replayed only while these stay.

    Regenerate (after an announced format change): print the two lists below.
    """
    a, b = step_noise(seed=7, step=3, rank=2).factors("blocks.1.att.key.weight", torch.tensor([0, 5]))
    assert a.shape == (2, 128, 2) and b.shape == (2, 128, 2)
    assert a[1, :3].flatten().tolist() == GOLDEN_A
    assert b[0, -2:].flatten().tolist() == GOLDEN_B


GOLDEN_A = [-0.91015625, -1.140625, 0.5390625, -0.8125, -1.0703125, -0.29296875]
GOLDEN_B = [-0.29296875, -0.8515625, 1.8359375, -0.44140625]


def test_values_are_the_table_at_the_bytes_of_philox():
    """Written out in numpy for one direction, from the documented layout."""
    direction, step, count = 5, 3, (128 + 128) * 2
    words = [
        philox(torch.tensor([block, direction, step, 0]), hash_key("perturbation", 7, "head.weight"))
        for block in range(32)
    ]
    data = np.array([word.tolist() for word in words], dtype="<u4").tobytes()
    noise = Noise(7, select({"head.weight": (128, 128)}, {"*": 1.0}, 2)).at(step, 0.1)
    a, b = noise.factors("head.weight", torch.tensor([direction]))
    expected = normal_table().numpy()[np.frombuffer(data, np.uint8)[:count]]
    assert np.array_equal(torch.cat((a.flatten(), b.flatten())).numpy(), expected)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "blocks.0.att.v1"])
def test_a_direction_is_the_same_in_any_chunk(name):
    noise = step_noise(rank=3)
    a, b = noise.factors(name, torch.arange(10))
    part_a, part_b = noise.factors(name, torch.tensor([7, 2]))
    assert torch.equal(a[[7, 2]], part_a) and torch.equal(b[[7, 2]], part_b)


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("rows", [slice(0, 8), slice(8, 24), slice(101, 300), slice(299, 300)])
def test_some_rows_of_a_are_drawn_without_the_rest(rows, is_fast, monkeypatch):
    if not is_fast:
        monkeypatch.setattr(noise_module, "fill_from_table", None)
    noise = Noise(5, select({"head.weight": (300, 7)}, {"*": 1.0}, 3)).at(2**20, 0.1)
    a, b = noise.factors("head.weight", torch.arange(5))
    part_a, part_b = noise.factors("head.weight", torch.arange(5), rows)
    assert torch.equal(part_a, a[:, rows]) and torch.equal(part_b, b)


@pytest.mark.parametrize("count", [1, 16, 127, 128, 1000])
def test_the_cpu_kernel_gives_the_bits_of_the_torch_operations(count):
    directions = torch.tensor([0, 3, 2**31 + 7])
    noise = Noise(5, select({"head.weight": (count, 1)}, {"*": 1.0}, 1)).at(2**20, 0.1)
    fast = torch.cat([part.flatten(1) for part in noise.factors("head.weight", directions)], 1)
    plain = table_values(directions, (2**20, *hash_key("perturbation", 5, "head.weight")), 0, count + 1)
    assert noise_module.fill_from_table is not None
    assert torch.equal(fast, plain)


def test_seeds_steps_directions_and_tensors_share_nothing():
    def values(seed=0, step=0, direction=0, name="blocks.1.att.key.weight"):
        return step_noise(seed, step).factors(name, torch.tensor([direction]))[0].flatten()

    first = values()
    for other in (values(seed=1), values(step=1), values(direction=1), values(name="head.weight")[:128]):
        # 256 equally likely values: equal by chance in 1 of 256 places.
        assert (first[:64] == other[:64]).float().mean() < 0.1
        assert abs(torch.corrcoef(torch.stack((first[:64], other[:64])))[0, 1]) < 0.5


def test_entries_have_zero_mean_and_unit_variance_and_are_uncorrelated():
    a, b = step_noise(rank=2).factors("head.weight", torch.arange(512))
    values = torch.cat((a.flatten(1), b.flatten(1)), 1)  # (512, 384)
    assert values.mean().abs() < 5 / values.numel() ** 0.5
    assert values.var().item() == pytest.approx(1, abs=0.02)
    correlation = torch.corrcoef(values[:, :64].T) - torch.eye(64)
    assert correlation.abs().max() < 6 / 512**0.5


def test_only_matrices_are_targets_by_default_and_layer_0_value_mix_never():
    selected = select(SHAPES, {"matrices": 1.0}, 1)
    assert list(selected) == ["blocks.1.att.v1", "blocks.1.att.w2", "blocks.1.att.key.weight"]
    assert "blocks.0.att.v1" not in select(SHAPES, {"*": 1.0}, 1)


def test_groups_and_patterns_and_the_later_multiplier_wins():
    assert list(select(SHAPES, {"vectors": 1.0}, 1)) == [
        "blocks.0.att.x_r",
        "blocks.0.att.r_k",
        "blocks.1.att.ln_x.bias",
    ]
    assert list(select(SHAPES, {"state": 1.0}, 1)) == ["blocks.1.att.time_state"]
    selected = select(SHAPES, {"blocks.*": 1.0, "blocks.1.att.w2": 3.0}, 1)
    assert selected["blocks.1.att.w2"].multiplier == 3 and selected["blocks.1.att.v1"].multiplier == 1


def test_a_pattern_without_a_match_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"'head.wieght' matches no tensor.*head\.weight"):
        select(SHAPES, {"head.wieght": 1.0}, 1)


def test_scale_is_sigma_times_multiplier_over_root_rank():
    noise = step_noise(rank=4, targets={"head.weight": 10.0, "blocks.0.att.x_r": 1.0})
    assert noise.scale("head.weight") == pytest.approx(0.1 * 10 / 2)
    assert noise.scale("blocks.0.att.x_r") == pytest.approx(0.1)  # full noise has no rank


def test_mirrored_members_have_opposite_signs():
    assert sign(torch.arange(4)).tolist() == [1, -1, 1, -1]


def test_uniform_numbers_are_uniform():
    counter = torch.zeros(20000, 4, dtype=torch.int64)
    counter[:, 0] = torch.arange(20000)
    numbers = uniform(counter, hash_key("test")).sort().values
    assert numbers[0] >= 0 and numbers[-1] < 1
    largest_gap = (numbers - torch.arange(20000) / 20000).abs().max()
    assert largest_gap < 1.63 / 20000**0.5  # Kolmogorov-Smirnov at 1 %
