from decimal import Decimal

import pytest

from rwkv_es.task.answers import final_part, last_boxed, last_number, last_tagged, vote


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{6}", "6"),
        (r"\boxed{5}, no: \boxed{6}.", "6"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{6}}", "6"),
        (r"\boxed{1 \text{ of \boxed{7}}} {}", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{}", ""),
        (r"\boxed{1} \boxed{2", "1"),
        (r"} \boxed{3}", "3"),
        (r"{\boxed{4}", "4"),
        (r"boxed{4}", None),
        (r"\boxed 4", None),
        ("", None),
    ],
)
def test_the_last_closed_box_counts(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 and 4.50", "4.50"),
        ("#### 7 or 8", "7"),
        ("#####7 8", "7"),
        ("-1,000", "-1000"),
        ("none", None),
        ("#### x 5", "5"),
    ],
)
def test_the_marked_or_last_number_counts(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_the_last_closed_tag_counts():
    assert last_tagged("<answer>a</answer><answer>b</answer><answer>c") == "b"
    assert last_tagged("</answer>a<answer>") is None


def test_thinking_and_invented_turns_are_left_out():
    assert final_part(" <think>1</think>2\n\nUser: 3") == "2"
    assert final_part(" <think>1") == ""
    assert final_part("1\n\nQuestion: 2") == "1"


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("It is 5.", "so 5.0", True),
        (r"\boxed{5}", "5", True),
        (r"\boxed{5.0\text{ cm}} for 3", r"#### \$5", True),
        (r"\boxed{\frac12}", r"\boxed{\dfrac{1}{2}}", True),
        (r"\boxed{x+1} 5", "5", False),
        ("<answer>1 + 2</answer>", "no <answer>1+2</answer>", True),
        ("blue\n", "I say\nblue", True),
        ("5", "6", False),
        ("<think>7", "8", False),
    ],
)
def test_texts_vote_for_what_they_answer(one, other, is_same):
    assert (vote(one) == vote(other)) == is_same
    assert vote("<think> 5") == vote("") == ""
