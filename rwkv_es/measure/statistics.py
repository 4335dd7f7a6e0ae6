"""Numbers about scored answers: pass@k, 95 % confidence intervals, McNemar's exact test."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
NUM_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A mean over problems and its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Right answers of two models to the same problems."""

    only_first: int  # problems that the first alone got right
    only_second: int
    p_value: float  # of McNemar's exact test, two-sided


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Estimate without bias that k samples hold a right one: 1 - C(n-c,k)/C(n,k) (arXiv 2107.03374, eq. 1)."""
    assert 1 <= k <= num_samples, (k, num_samples)
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def passes(num_samples: int, num_right: Sequence[int]) -> dict[int, list[float]]:
    """Return `pass_at_k` of each problem, by its number of right samples, for k = 1, 2, 4, ... and all samples."""
    ks = sorted({num_samples, *(2**i for i in range(num_samples.bit_length()))})
    return {k: [pass_at_k(num_samples, right, k) for right in num_right] for k in ks}


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate the mean of one value per problem: Wilson's interval if all are 0 or 1, else the bootstrap's."""
    if set(values) <= {0.0, 1.0}:
        return Estimate(sum(values) / len(values), *wilson(int(sum(values)), len(values)))
    return Estimate(math.fsum(values) / len(values), *bootstrap(values))


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Estimate the mean of first - second over the same problems; the interval is the bootstrap's over problems."""
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    return Estimate(math.fsum(gaps) / len(gaps), *bootstrap(gaps))


def wilson(num_right: int, size: int) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion (JASA 22, 1927)."""
    share, z2 = num_right / size, CONFIDENCE_Z**2
    centre = (share + z2 / (2 * size)) / (1 + z2 / size)
    half = CONFIDENCE_Z / (1 + z2 / size) * math.sqrt(share * (1 - share) / size + z2 / (4 * size**2))
    low = centre - half if num_right else 0.0  # rounding must not move what is exact
    return max(0.0, low), min(1.0, centre + half) if num_right < size else 1.0


def bootstrap(values: Sequence[float], num_resamples: int = NUM_RESAMPLES) -> tuple[float, float]:
    """Return the percentile interval of the mean over resampled values; the same values give the same interval."""
    data = np.asarray(values, np.float64)
    generator = np.random.Generator(np.random.Philox(key=0))  # a counter-based generator of its own
    means = [data[generator.integers(len(data), size=len(data))].mean() for _ in range(num_resamples)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Comparison:
    """Compare two models on the same problems: the exact binomial form of McNemar's test, two-sided."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    size, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(size, i) for i in range(fewer + 1)) / 2**size
    return Comparison(only_first, only_second, min(1.0, 2 * tail))
