from decimal import Decimal
from fractions import Fraction

import pytest

from rwkv_es.task.numbers import as_text, written_number


@pytest.mark.parametrize(
    "text",
    [
        "25",
        " 25 ",
        "25.",
        "25.0",
        "025",
        "+25",
        "$25$",
        r"\$25",
        "$25.00",
        "25\\%",
        "25%",
        r"\text{25}",
        r"\mathbf{25}",
        r"\mathbf{\text{25}}",
        r"\boldsymbol{25}",
        r"25^\circ",
        r"25^{\circ}",
        "25°",
        r"25\degree",
        r"25\text{ cm}",
        r"25\,\text{cm}^2",
        r"25 \text{ square units}",
        "25 dollars",
        "25cm",
        "25 km/h",
        "x = 25",
        "x=25.",
        "m+n=25",
        r"\left(25\right)",
        "(25)",
        r"\(25\)",
        r"\frac{50}{2}",
        r"\dfrac{50}{2}",
        "50/2",
        r"24\frac{2}{2}",
        "{25}",
        "€25",
        r"25~\text{m/s}",
        r"\displaystyle 25",
        r"25\ \mathrm{kg}",
        "25 cm.",
    ],
)
def test_25_in_all_its_clothes(text):
    assert written_number(text) == 25


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234", 1234), ("1{,}234", 1234), (r"1\,234", 1234), (r"1\!234", 1234), ("1,234,567.5", Decimal("1234567.5")),
        ("-3", -3), ("−3", -3), (r"-\$3", -3), (r"\text{-3}", -3), (".5", Decimal("0.5")), ("0.50", Decimal("0.5")), (r"\frac12", Fraction(1, 2)),
        (r"2\frac{1}{2}", Fraction(5, 2)), ("2 1/2", Fraction(5, 2)), (r"-\tfrac{7}{3}", Fraction(-7, 3)), ("12/5 inches", Fraction(12, 5)),
    ],
)  # fmt: skip
def test_other_numbers(text, number):
    assert written_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ".", "-", "25, 26", "25,26", "25 or 26", "5^2", "20+5", "25x", "25i", "25 26", "1,23", "twenty", "25!!", r"\sqrt{625}", "1e3", "1/0",
        r"\frac{1}{0}", "２５", "٣", "25" * 60, "nan", "inf", "x", "=25=", "(1, 2)", "25 cm 3", r"\{25\}", "25\n26", "0x19", "25:30", "2.5.1",
    ],
)  # fmt: skip
def test_anything_else_is_no_number(text):
    assert written_number(text) is None


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (Decimal("25.00"), "25"), (Decimal("1E+3"), "1000"), (Decimal("-0.0"), "0"), (Decimal("-2.50"), "-2.5"), (Fraction(1, 3), "1/3"),
        (Decimal("1234567890123456789012345678901234567890.5"), "1234567890123456789012345678901234567890.5"), (Decimal("1E-7"), "0.0000001"),
    ],
)  # fmt: skip
def test_equal_numbers_are_written_alike(number, text):
    assert as_text(number) == text
