"""The update written out member by member."""

import math

import torch


def fitness_of(count, seed=1):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_sum(noise, name, fitness):
    """Sum f_n s_n E_n / N member by member, E_n = A B^T / sqrt(r) written out in float64."""
    target = noise.targets[name]
    total = 0
    for member, f in enumerate(fitness.tolist()):
        a, b = noise.factors(name, torch.tensor([member // 2]))
        sign = 1 if member % 2 == 0 else -1
        total = total + f * sign * (a[0].double() @ b[0].double().mT) / math.sqrt(target.rank)
    return total / len(fitness)
