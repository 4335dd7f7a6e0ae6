"""The curve of text, written out by hand."""

import math

import pytest

from rwkv_es.system.curve import curve, series


def test_series_leaves_out_what_is_not_a_number():
    assert series([{"a": 1}, {"a": math.nan}, {"a": None}, {"b": 3}, {"a": 2.0}], "a") == [1, 2.0]


def test_a_curve_rises_where_the_values_rise():
    assert curve([0.0, 1.0, 2.0, 3.0], width=7, height=2).splitlines() == [
        "   3.000 │  ▃█",
        "   0.000 │▁▆██",
    ]


def test_a_short_curve_is_widened_evenly():
    assert curve([0.0, 1.0], width=5, height=1) == "   1.000 │▁▁██"
    assert curve([0.0, 1.0], height=1) == "   1.000 │▁▁▁▁████"


def test_a_long_curve_is_thinned_and_keeps_its_end():
    rows = curve([0.0] * 999 + [1.0], width=20, height=1).splitlines()
    assert rows == ["   1.000 │" + "▁" * 19 + "█"]


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_nothing_to_draw_is_said(values):
    assert curve(values) == "(nothing to draw yet)"


def test_a_flat_curve_is_flat():
    assert curve([0.5, 0.5], height=1) == "   0.500 │▁▁▁▁▁▁▁▁"
