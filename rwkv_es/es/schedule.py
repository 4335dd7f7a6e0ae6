"""How the learning rate and the noise scale change over a run."""

import math

from rwkv_es.config.options import Config


def sigma_at(config: Config, step: int) -> float:
    """Return the noise scale of a step."""
    return config.sigma * (decay(config, step) if config.sigma_decay else 1.0)


def decay(config: Config, step: int) -> float:
    """Return the schedule's factor: 1 at the first step, `schedule_end` at the last one."""
    if config.schedule == "constant" or config.steps < 2:
        return 1.0
    done = step / (config.steps - 1)
    falling = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.schedule_end + (1 - config.schedule_end) * falling
