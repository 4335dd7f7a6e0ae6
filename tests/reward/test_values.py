"""What rewards return, in the forms in which people return it."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from rwkv_es.reward.values import awaited, listed, metric, number


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (True, 1.0),
        (Decimal("0.25"), 0.25),
        (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(-2), -2.0),
        (np.bool_(True), 1.0),
        (np.array(0.5), 0.5),
        (np.array([[0.5]]), 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5], requires_grad=True), 0.5),
        (torch.tensor(True), 1.0),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (1e30, 1e30),
        (None, None),
    ],
)
def test_numbers_of_any_library_are_numbers(value, expected):
    found = number(value)
    assert found == expected and type(found) in (float, type(None))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1.0", "must be a number or None .*; got str"),
        (b"1", "got bytes"),
        ({"score": 1.0}, "got dict"),
        ([1.0], "got list"),
        (1j, "got complex"),
        (np.complex64(1), "got complex"),
        (np.array([1.0, 2.0]), r"one number; got ndarray of shape \(2,\)"),
        (torch.tensor([]), r"one number; got Tensor of shape \(0,\)"),
        (torch.tensor(float("nan")), "must be finite"),
        (Decimal("Infinity"), "must be finite"),
        (float("-inf"), "must be finite, or None .*; got -inf"),
        (1e308, r"between -1e\+30 and 1e\+30; got 1e\+308"),
        (-2e30, "between"),
        (10**400, "too large"),
    ],
)
def test_anything_else_is_explained(value, message):
    with pytest.raises((TypeError, ValueError, OverflowError), match=message):
        number(value)
    assert metric(value) is None


@pytest.mark.parametrize(
    "values",
    [[0.5, None], (0.5, None), iter([0.5, None]), (x for x in (0.5, None)), {0: 0.5, 1: None}.values()],
)
def test_a_list_may_be_anything_to_go_through(values):
    assert listed(values, 2) == [0.5, None]


def test_arrays_and_tensors_are_lists():
    assert [number(value) for value in listed(np.array([0.5, 1.0]), 2)] == [0.5, 1.0]
    assert [number(value) for value in listed(torch.tensor([[0.5], [1.0]]), 2)] == [0.5, 1.0]


@pytest.mark.parametrize("values", [1.0, None, "ab", {1: 2, 3: 4}, np.array(1.0), torch.tensor(1.0), [1.0], [1.0] * 3])
def test_a_list_of_another_length_or_none_is_refused(values):
    with pytest.raises(ValueError, match=r"one value per completion \(2\)"):
        listed(values, 2)


def test_coroutines_run_in_one_loop_and_may_be_entries():
    import asyncio

    async def loop():
        return asyncio.get_running_loop()

    assert awaited(loop()) is awaited(loop())

    async def half():
        await asyncio.sleep(0)
        return 0.5

    assert listed([half(), half()], 2) == [0.5, 0.5]
    assert awaited(0.5) == 0.5
