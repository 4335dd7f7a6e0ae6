"""How the learning rate and the noise scale change over a run."""

import math


def decay(schedule: str, step: int, num_steps: int, end: float) -> float:
    """Return the schedule's factor at a step (from 0): 1 at the first one, `end` at the last one and after it.

    schedule: "constant" (always 1), "linear", or "cosine".
    """
    if schedule == "constant" or num_steps < 2:
        return 1.0
    done = min(1.0, step / (num_steps - 1))
    falling = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return end + (1 - end) * falling
