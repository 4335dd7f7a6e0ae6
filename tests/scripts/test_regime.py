"""The map of who wins where: its bytes and seconds against arithmetic written out."""

import sys

import pytest
from places import ROOT

sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

import regime  # noqa: E402

from rwkv_es.planning.devices import GPUS  # noqa: E402
from rwkv_es.pretrained.header import SIZES  # noqa: E402


def test_grpo_holds_sixteen_bytes_of_a_weight_and_a_token_layer_by_layer():
    """1.5B: 1,527,404,544 weights (RWKV-LM's own count), 24 layers of 2048, 65,536 logits."""
    weights, tokens = 16 * 1_527_404_544, 128 + 4096
    layers, logits = 2 * tokens * 2048 * (24 + 70), 3 * 4 * 1024 * 65_536
    assert regime.grpo_bytes(SIZES["1.5b"], 4096) == pytest.approx(2e9 + weights + layers + logits, rel=1e-3)


def test_where_sixteen_bytes_of_a_weight_do_not_fit_ours_is_alone():
    """24.4 GB for 1.5B, 115 GB for 7.2B; two bytes a weight and the states fit. 26 GB of 13.3B do not fit 24."""
    small, large = GPUS["rtx4090-24"], GPUS["h100-80"]
    assert regime.grpo(SIZES["0.4b"], small, 256).in_flight and not regime.grpo(SIZES["1.5b"], small, 256).in_flight
    assert regime.grpo(SIZES["2.9b"], large, 256).in_flight and not regime.grpo(SIZES["7.2b"], large, 256).in_flight
    assert regime.cell(SIZES["7.2b"], large, 256).startswith("ours alone")
    assert regime.cell(SIZES["13.3b"], small, 256) == "neither fits"


def test_grpos_way_back_takes_eight_operations_of_a_weight_and_token():
    """At half of an H100's 0.8 * 989 TFLOP/s; generating comes on top of it."""
    device, length = GPUS["h100-80"], 16384
    least = 8 * 1_527_404_544 * (128 + length) / (0.5 * 0.8 * 989e12)
    found = regime.grpo(SIZES["1.5b"], device, length)
    assert least < found.seconds < 5 * least and found.in_flight == regime.ROLLOUTS


def test_what_a_layer_keeps_of_a_token_is_what_was_measured():
    pytest.importorskip("cma")
    from compare.bytes import activations
    from rwkv7_sequence import init_params

    params = init_params(2, 128, 50, 64, 0)
    kept = (activations(params, 64) - activations(params, 32)) / 32 / 4 / 2 / 128
    assert kept == pytest.approx(regime.KEPT_MEASURED, rel=0.1)


def test_the_map_is_printed(capsys):
    assert regime.main(["--gpus", "h100-80", "--models", "0.1b", "7.2b"]) == 0
    header, _, small, large = capsys.readouterr().out.strip().splitlines()
    assert header.startswith("| h100-80 | 256 tokens") and small.startswith("| 0.1b | ") and "ours alone" in large
