"""A step as it is remembered: numbers alone, so that looking at a run needs no torch."""

from collections.abc import Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """One training step, as exact as it was computed: what the weights are a function of, besides base and options."""

    step: int  # from 0
    rewards: Sequence[Sequence[float | None]]  # (N,P), None: missing
    fitness: Sequence[float]  # (N,)
    sigma: float
    lr: float
    tokens: int
    seconds: float
    checksum: str  # of the weights after the step
