"""A model's entries as one vector z, for methods that know no layers: weights = origin + scale * z."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.model.layout import Params

HEAD = "head.weight"
FEW, NORMS = ("ln_out.*",), ("ln_out.*", "*.ln?.*")  # the entries just before the head; all layer norms


class Space(NamedTuple):
    """The entries that a method moves, D of them; z = 0 is the base."""

    params: Params
    names: tuple[str, ...]
    origin: Tensor  # (D,)
    scale: Tensor  # (D,)


def space_of(params: Params, settings: Mapping[str, Any]) -> Space:
    """Take the tensors that match `names` (default all); the head's noise and steps are `head` times as large."""
    patterns: Sequence[str] = settings.get("names", ("*",))
    names = tuple(name for name in params if any(fnmatchcase(name, pattern) for pattern in patterns))
    factors = [float(settings.get("head", 1.0)) if name == HEAD else 1.0 for name in names]
    scale = torch.cat([torch.full((params[name].numel(),), factor) for name, factor in zip(names, factors)])
    return Space(params, names, torch.cat([params[name].flatten() for name in names]), scale)


def params_at(space: Space, z: Tensor) -> Params:
    """Return the whole model at a point z (D,)."""
    weights = torch.addcmul(space.origin, space.scale, z)
    parts = weights.split([space.params[name].numel() for name in space.names])
    moved = {name: part.view(space.params[name].shape) for name, part in zip(space.names, parts)}
    return {**space.params, **moved}


def normal(seed: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal numbers that depend on seed and step alone."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    return torch.randn(shape, generator=generator)
