"""Learning rates of other projects in ours, derived from what one step does to the weights.

Ours: `W += lr/N sum_n f_n s_n E_n`, E_n of unit variance, f the z-score over the matrix of rewards, averaged over the
problems. Its standard deviation over the members, `fitness_std` below, is 1 if all problems agree on who is better and
1/sqrt(P) if they have nothing in common; `rwkv-es doctor` measures it. A step then moves an entry by
lr * fitness_std / sqrt(N).
"""

import math


def from_hyperscale(lr_scale: float, sigma: float, population: int, fitness_std: float = 1.0) -> float:
    """Convert HyperscaleES's lr_scale: `W += lr_scale sqrt(F) 1/F sum f sigma s E` over F answers, var(f) = 1.

    Each of its answers has noise of its own, so that a step moves an entry by lr_scale * sigma, whatever F is.
    """
    return lr_scale * sigma * math.sqrt(population) / fitness_std


def from_es_at_scale(alpha: float, fitness_std: float = 1.0) -> float:
    """Convert es-at-scale's alpha (its sigma / 2): `W += alpha/N sum z E`, z the z-score of the members' means."""
    return alpha / fitness_std


def from_eggroll_vllm(lr: float, fitness_std: float = 1.0) -> float:
    """Convert eggroll-vllm's lr: `W += lr/(N sigma) sum_pairs (F+ - F-) sigma E`, F the z-score of the members' means.

    Without its division by the standard deviation it is the same number as ours with `--fitness centered`.
    """
    return lr / fitness_std
