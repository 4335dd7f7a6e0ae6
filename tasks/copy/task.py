"""Copy: repeat four digits. The smallest task, for first runs and for tests; needs no data."""

import random
import zlib
from collections.abc import Sequence

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Generated, Problem

VERSION = "1"
STOP = ("\n",)
MAX_NEW_TOKENS = 12
TEMPLATE = "raw"

NUM_GENERATED = {"train": 10_000, "test": 500}
NUM_DIGITS = 4


def problems(split: str, data: str = "") -> Sequence[Problem]:
    """Generate problems: item i depends on (split, i) alone; `data` is not used."""
    if data:
        raise TaskError(f"task copy generates its problems and takes no data; got {data!r}")
    return Generated(lambda index: _generate(split, index), NUM_GENERATED[split])


def reward(problem: Problem, text: str) -> float:
    """Score the share of words that are right from the first one on; 1 for the digits and nothing else."""
    wanted = problem.answer.split()
    words = text.split(maxsplit=len(wanted))
    num_right = 0
    while num_right < min(len(words), len(wanted)) and words[num_right] == wanted[num_right]:
        num_right += 1
    return num_right / max(len(words), len(wanted))


def _generate(split: str, index: int) -> Problem:
    """Draw digits until their hash falls into the split, so that the splits share no problem."""
    rng = random.Random(f"copy/{split}/{index}")
    while True:
        digits = " ".join(str(rng.randint(0, 9)) for _ in range(NUM_DIGITS))
        if ("test" if zlib.crc32(digits.encode()) % 8 == 0 else "train") == split:
            return Problem(f"{digits}:", digits)
