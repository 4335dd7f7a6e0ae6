import pytest

from rwkv_es.reward.builtin import has_form, make_length
from rwkv_es.task import Problem


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("42", 1.0),
        (" \n", 0.0),
        (" <think>a</think> 42", 1.0),
        (" <think>\n</think>\n42", 1.0),
        (" <think>a</think> \n", 0.0),
        (" <think>42", 0.0),
        ("a <think>b</think>42", 0.0),
        (" <think>a<think>b</think>42", 0.0),
        (" <think>a</think>b</think>42", 0.0),
        ("a</think>42", 0.0),
    ],
)
def test_thinking_once_begun_ends_once_and_something_follows(text, reward):
    assert has_form(Problem("", "42"), text) == reward


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (" <think>a</think><answer>1</answer>", 1.0),
        ("<answer>1</answer>", 1.0),
        (" <think><answer>1</answer></think>", 0.0),
        ("<answer>1</answer><answer>2</answer>", 0.0),
        ("<answer> </answer>", 0.0),
        ("</answer>1<answer>", 0.0),
        ("1", 0.0),
    ],
)
def test_an_answer_tag_is_expected_where_the_gold_answer_has_one(text, reward):
    assert has_form(Problem("", "<answer>42</answer>"), text) == reward


@pytest.mark.parametrize(
    ("argument", "length", "reward"), [("10", 5, -0.5), ("10", 20, -1.0), ("", 1000, -0.25), ("10", 0, 0.0)]
)
def test_length_costs_up_to_one(argument, length, reward):
    assert make_length(argument)(Problem("", ""), "x" * length) == reward
