"""What a text answers in the end: the part after thinking, and the answer that stands in it."""

import re
from decimal import Decimal

from rwkv_es.task.numbers import Number, as_text, written_number

MAX_DIGITS = 50
_DIGITS = r"([0-9][0-9,]*(?:\.[0-9]+)?|(?<![.\w])\.[0-9]+)"
_NUMBER = re.compile(_DIGITS)
_MARKED = re.compile(r"(?<!#)#{4,}([\s*$+−-]*)" + _DIGITS)
_BOX = "\\boxed{"


def final_part(text: str) -> str:
    """Return what follows the thinking, up to the next turn or question the model may have made up itself."""
    text = text.partition("\n\nUser:")[0]
    if "<think" in text or "</think>" in text:
        text = text.rpartition("</think>")[2] if "</think>" in text else ""
    return text.partition("\n\nQuestion:")[0]


def last_number(text: str) -> Decimal | None:
    """Return the number after the last `####` that has one, else the last number.

    None if there is no number or it is over 50 characters long.
    """
    if match := _last_match(_MARKED, text):
        is_negative = "-" in match[1] or "−" in match[1]
        digits = match[2]
    elif match := _last_match(_NUMBER, text):
        is_negative = _ends_in_sign(text[max(0, match.start() - 3) : match.start()])
        digits = match[1]
    else:
        return None
    digits = digits.replace(",", "")
    if len(digits) > MAX_DIGITS:
        return None
    return Decimal(digits).copy_negate() if is_negative else Decimal(digits)  # its minus rounds to 28 digits


def answered_number(text: str) -> Number | None:
    """Return the number in the last box or after the last `####`, whichever comes later, else the last number.

    A box that is no number, with or without a unit, gives the last one in it; one without any counts for nothing.
    """
    box = _last_box(text)
    if box is not None:
        mark = _last_match(_MARKED, text)
        inside = text[slice(*box)]
        number = written_number(inside)
        number = last_number(inside) if number is None else number
        if number is not None and (mark is None or mark.start() < box[0]):
            return number
    return last_number(text)


def last_tagged(text: str) -> str | None:
    """Return what stands in the last `<answer>…</answer>`, tags paired from the left; linear in the text."""
    answer, end = None, 0
    while (start := text.find("<answer>", end)) >= 0:
        close = text.find("</answer>", start)
        if close < 0:
            break
        answer, end = text[start + len("<answer>") : close], close + len("</answer>")
    return answer


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last `\boxed{…}` whose braces match, without boxes round it; linear in the text."""
    box = _last_box(text)
    return None if box is None else text[slice(*box)]


def _last_box(text: str) -> tuple[int, int] | None:
    if _BOX not in text:
        return None
    starts: list[int] = []  # of the boxes that are open
    opened: list[bool] = []  # of every open brace, whether it is a box's
    last: tuple[int, int] | None = None
    for match in re.finditer(r"\\boxed\{|\\.|[{}]", text, re.DOTALL):
        if match[0] == "}" and opened:
            if opened.pop():
                start = starts.pop()
                if last is None or start > last[1]:
                    last = (start, match.start())
        elif match[0] in (_BOX, "{"):
            opened.append(match[0] == _BOX)
            if match[0] == _BOX:
                starts.append(match.end())
    return last


def vote(text: str) -> str:
    """Return what a text answers, to be compared with other texts' answers; "" if it gives none.

    The last answer tag, box, or number after the thinking, else the last line.
    """
    text = final_part(text)
    for found in (last_tagged(text), last_boxed(text)):
        if found is not None:
            number = written_number(found)
            return "".join(found.split()) if number is None else as_text(number)
    number = answered_number(text)
    if number is not None:
        return as_text(number)
    return text.rstrip().rpartition("\n")[2].strip()


def _ends_in_sign(before: str) -> bool:
    """Tell "-3", "-$3" and "= -3" from "10-3", by up to three characters before the digits."""
    before = before.removesuffix("$")
    return before.endswith(("-", "−")) and not before[-2:-1].isalnum()


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = None
    for last in pattern.finditer(text):  # noqa: B007
        pass
    return last
