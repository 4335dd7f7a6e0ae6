"""What is perturbed, and how much: the targets among a model's tensors. Arithmetic over names and shapes only."""

import difflib
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from rwkv_es.system.errors import ConfigError

_MATRICES = ("receptance.weight", "key.weight", "value.weight", "output.weight")
_LOW_RANK = ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")
GROUPS: dict[str, tuple[str, ...]] = {
    "matrices": (
        *(f"blocks.*.att.{name}" for name in (*_MATRICES, *_LOW_RANK)),
        "blocks.*.ffn.key.weight",
        "blocks.*.ffn.value.weight",
    ),
    "vectors": (
        *("blocks.*.ln?.*", "ln_out.*", "blocks.*.att.x_?", "blocks.*.att.?0", "blocks.*.att.k_?", "blocks.*.att.r_k"),
        *("blocks.*.att.ln_x.*", "blocks.*.ffn.x_k"),
    ),
    "state": ("blocks.*.att.time_state",),
}
UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")  # present in official files, read by nothing


class Target(NamedTuple):
    """How one tensor is perturbed. A is (D, *batch, p, r), B is (D, *batch, q, r); A @ B.T has numel() entries."""

    batch: tuple[int, ...]  # () or, for the initial state, (H,)
    p: int
    q: int
    rank: int  # 1 and q = 1 for vectors: full noise
    is_full: bool
    multiplier: float  # of sigma and of the learning rate

    @property
    def num_values(self) -> int:
        """Count the random values per direction (full noise needs no B)."""
        return math.prod(self.batch) * (self.p if self.is_full else (self.p + self.q) * self.rank)


def select(shapes: Mapping[str, tuple[int, ...]], targets: Mapping[str, float], rank: int) -> dict[str, Target]:
    """Return the perturbed tensors in file order; a later pattern overrides the multiplier of an earlier one.

    Raises:
        ConfigError: a pattern that matches no tensor.
    """
    multipliers: dict[str, float] = {}
    for name_or_pattern, multiplier in targets.items():
        patterns = GROUPS.get(name_or_pattern, (name_or_pattern,))
        matched = [n for n in shapes if n not in UNUSED and any(fnmatchcase(n, p) for p in patterns)]
        if not matched:
            close = difflib.get_close_matches(name_or_pattern, [*GROUPS, *shapes], n=1, cutoff=0.3)
            raise ConfigError(f"target {name_or_pattern!r} matches no tensor of the model; nearest: {close or 'none'}")
        multipliers.update(dict.fromkeys(matched, multiplier))
    return {n: _target(n, shape, rank, multipliers[n]) for n, shape in shapes.items() if n in multipliers}


def _target(name: str, shape: tuple[int, ...], rank: int, multiplier: float) -> Target:
    if name.endswith("time_state"):
        return Target(shape[:1], shape[1], shape[2], rank, False, multiplier)
    if len(shape) == 2 and not name.endswith("r_k"):
        return Target((), shape[0], shape[1], rank, False, multiplier)
    return Target((), math.prod(shape), 1, 1, True, multiplier)
