"""One number as people and LaTeX write it: `1{,}000`, `25^\\circ`, `\\text{25}`, `50\\%`, `2\\frac{1}{2}`, 25 cm."""

import re
from decimal import Decimal
from fractions import Fraction

Number = Decimal | Fraction

MAX_CHARS = 100
_MAX_WRAPPERS = 10
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|mbox|underline|boxed|operatorname)\s*"
    r"\{([^{}]*)\}"
)
_BLANKS = re.compile(r"\\[,;:! ]|\\q?quad|~|\u00a0|\u2009|\u202f")
_NOTHING = re.compile(  # signs that change no number
    r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\\(|\\\)|\\\[|\\\]|\\?\$|[€£¥]"
    r"|\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|°|\\?%"
)
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!;: ]|\u00a0|\u2009|\u202f)(?=[0-9]{3}(?![0-9]))")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))")
_WHOLE = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+"
_UNIT = r"(?:\s*[A-Za-z]{2,}\.?|\s*[A-Za-z]+/[A-Za-z]+)(?:\s*\^\s*\{?[23]\}?|[²³])?"
_NUMBER = re.compile(
    rf"(?:[A-Za-z][A-Za-z0-9_+\-*/ ]{{0,30}}=)?\s*(?P<sign>[-+−]?)\s*\(?(?:"
    rf"(?:(?P<times>{_WHOLE})\s+)?(?P<above>{_WHOLE})\s*/\s*(?P<below>{_WHOLE})"
    rf"|(?P<whole>{_WHOLE})?(?P<rest>\.[0-9]*)?)\)?(?:{_UNIT}){{0,4}}\s*[.!]?"
)


def written_number(text: str) -> Number | None:
    """Return the number that a text of up to 100 characters is, with or without a unit; None if it is none."""
    if len(text) > MAX_CHARS:
        return None
    text = _THOUSANDS.sub(",", text)
    for _ in range(_MAX_WRAPPERS):
        text, count = _WRAPPER.subn(r" \1 ", text)
        if not count:
            break
    text = _FRACTION.sub(_as_slash, _NOTHING.sub("", _BLANKS.sub(" ", text)))
    match = _NUMBER.fullmatch(text.strip().removeprefix("{").removesuffix("}").strip())
    if match is None:
        return None
    found = _value(match)
    if found is None or match["sign"] not in ("-", "−"):
        return found
    return -found if isinstance(found, Fraction) else found.copy_negate()  # Decimal's minus rounds to 28 digits


def as_text(number: Number) -> str:
    """Write a number so that equal ones are written alike, without an exponent."""
    if isinstance(number, Fraction):
        return str(number)
    sign, digits, exponent = number.as_tuple()
    assert isinstance(exponent, int), "it is finite"
    whole = f"{number.copy_abs():f}"
    whole = whole.rstrip("0").rstrip(".") if "." in whole else whole
    return f"-{whole}" if sign and any(digits) else whole


def _as_slash(match: re.Match[str]) -> str:
    above, below = match[1] or match[2], match[3] or match[4]
    return f" {above}/{below} "


def _value(match: re.Match[str]) -> Number | None:
    whole, rest = match["whole"] or "", match["rest"] or ""
    if match["below"] is not None:
        times, above, below = (int((match[name] or "0").replace(",", "")) for name in ("times", "above", "below"))
        return _plain(times + Fraction(above, below)) if below else None
    digits = whole.replace(",", "") + rest.removesuffix(".") if rest == "." else whole.replace(",", "") + rest
    return Decimal(digits) if any(map(str.isdigit, digits)) else None


def _plain(number: Fraction) -> Number:
    return Decimal(number.numerator) if number.denominator == 1 else number
