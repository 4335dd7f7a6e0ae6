"""The fp32 numbers that bf16 weights are rounded from: on the host, or on a GPU the 16 bits that are rounded off.

A step is often smaller than a bf16 ulp; it adds up in these. On a GPU a weight and its rest are the fp32 number, bit
for bit, in half the memory, and nothing crosses the bus at a step.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rwkv_es.model.layout import Params


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest bf16 (of two equally near ones the larger) and the rest of the bits: fp32 -> bf16, int16."""
    bits = values.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(weights: Tensor, rest: Tensor) -> Tensor:
    """Return the fp32 numbers that `split` was given."""
    return ((weights.view(torch.int16).to(torch.int32) << 16) + rest).view(torch.float32)


class Masters(Mapping[str, Tensor]):
    """Fp32 masters by name; of a GPU's they are made when they are asked for, one at a time."""

    def __init__(self, params: Params, names: Sequence[str], in_parts: bool) -> None:
        """Start from the weights. in_parts: hold the rest of each weight on its device, not a copy on the host."""
        self.params, self.in_parts = params, in_parts
        self.held = {
            name: torch.zeros_like(params[name], dtype=torch.int16) if in_parts else params[name].float().cpu()
            for name in names
        }

    def __getitem__(self, name: str) -> Tensor:
        return join(self.params[name], self.held[name]) if self.in_parts else self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)

    def read(self, name: str, rows: slice) -> Tensor:
        """Return a copy of some rows on the weights' device."""
        held, weights = self.held[name][rows], self.params[name][rows]
        return join(weights, held) if self.in_parts else held.to(weights.device, copy=True)

    def write(self, name: str, rows: slice, values: Tensor) -> None:
        """Set some rows, and the weights that are rounded from them, in place."""
        held, weights = self.held[name][rows], self.params[name][rows]
        if self.in_parts:
            rounded, rest = split(values.to(weights.device, torch.float32))
            weights.copy_(rounded)
            held.copy_(rest)
        else:
            held.copy_(values)
            weights.copy_(values if weights.device.type == "cpu" else split(values.to(weights.device))[0])


class Exact(Mapping[str, Tensor]):
    """A model's weights, where there are masters those; nothing is copied before it is asked for."""

    def __init__(self, params: Params, masters: Masters) -> None:
        self.params, self.masters = params, masters

    def __getitem__(self, name: str) -> Tensor:
        return self.masters[name] if name in self.masters.held else self.params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)
