"""How far a run will move the weights, from its options."""

import math

from rwkv_es.config.options import Config
from rwkv_es.es import conversions
from rwkv_es.es.schedule import decay

WALK_PROPOSED, WALK_PUBLISHED = 1e-3, 2e-3  # of a weight, over a run; published: EGGROLL's runs and ES at Scale's
LARGE_WIDTH = 512  # from which on a model's weights are small numbers, so that these bounds hold for them


def walk(config: Config) -> tuple[float, float] | None:
    """Return how far a weight moves at most in a step, and in all steps as a random walk; None: not known.

    A z-scored fitness has a variance of 1 if all problems agree, of 1/P if the rewards are pure noise. An entry of
    A B^T/sqrt(r) has variance 1, so that the mean of N such products, weighted by it, is as large as 1/sqrt(N).
    """
    if config.fitness != "zscore" or config.optimizer != "sgd":
        return None
    factors = [decay(config.schedule, step, config.steps, config.schedule_end) for step in range(config.steps)]
    first = config.lr * max(config.targets.values()) / math.sqrt(config.population)
    return first, first * math.sqrt(sum(factor * factor for factor in factors))


def walk_lines(config: Config, width: int) -> list[str]:
    """Return the same in words, for a model of this width, and what to change if a large one would go too far."""
    found = walk(config)
    if found is None:
        return []
    step, total = found
    largest = max(config.targets.values())
    noise = step / math.sqrt(config.prompts)
    bound = f"; stay below {WALK_PROPOSED:g} (published runs: about {WALK_PUBLISHED:g})" if width >= LARGE_WIDTH else ""
    lines = [
        f"walk: a step moves a weight by at most {step:.2g}, {step / (config.sigma * largest):.2g} sigma "
        f"({noise:.2g} by rewards of noise), {config.steps} steps as a random walk by {total:.2g}{bound}"
    ]
    if bound and total > WALK_PROPOSED:
        lines.append(f"  change: --lr {config.lr * WALK_PROPOSED / total:.2g}, fewer steps, or a larger population")
    return lines


def rate_lines(config: Config) -> list[str]:
    """Return the rate as others count it: from problems that have nothing in common to problems that agree."""
    if walk(config) is None:
        return []
    least = 1 / math.sqrt(config.prompts)  # of the fitness's standard deviation, see `es.conversions`
    scale = config.lr / conversions.from_hyperscale(1.0, config.sigma, config.population)
    alpha = config.lr / conversions.from_es_at_scale(1.0)
    return [
        f"lr elsewhere: lr_scale {scale * least:.2g} to {scale:.2g} in HyperscaleES, {alpha * least:.2g} to "
        f"{alpha:.2g} in es-at-scale and eggroll-vllm"
    ]
