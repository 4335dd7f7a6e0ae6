"""The only source of randomness: values that are pure functions of counters (Philox4x32-10).

Perturbation of tensor W for member n = 2j or 2j+1 (EGGROLL, arXiv 2511.16652, eq. 5):
`W + s_n * sigma/sqrt(r) * A_j @ B_j.T`, s_n = +1 for even n and -1 for odd n.
"""

import hashlib
import math
from functools import lru_cache
from statistics import NormalDist
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_es.noise.targets import Target, select

try:
    from rwkv_es.noise.kernels import fill_from_table
except ImportError:  # numba is missing or does not fit the installed numpy
    fill_from_table = None

__all__ = ["Noise", "StepNoise", "Target", "select"]

_MASK = 0xFFFFFFFF
_BYTES_PER_BLOCK = 16
WHOLE = slice(None)


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Return 128 random bits for every counter: (..., 4) int64 words below 2**32 -> (..., 4) int64 words.

    Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap around above 2**63; shift and mask still give the right 32-bit halves.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK) ^ c1 ^ k0,
            second & _MASK,
            ((first >> 32) & _MASK) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), -1)


def hash_key(*words: object) -> tuple[int, int]:
    """Hash words (a purpose, a seed, a name) into a Philox key, so that neighbouring seeds share nothing."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


@lru_cache(maxsize=4)
def normal_table(device: torch.device | str = "cpu") -> Tensor:
    """Return (256,) fp32 standard-normal quantiles of unit variance, each exactly representable in bf16."""
    quantiles = torch.tensor([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)], dtype=torch.float64)
    table = quantiles / quantiles.square().mean().sqrt() * 0.9995  # 0.9995: the variance after rounding is 1.0001
    return table.to(torch.bfloat16).float().to(device)


def uniform(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Return one number in [0, 1) per counter: (..., 4) int64 -> (...) float64, multiples of 2**-32."""
    return philox(counter, key)[..., 0].double() / 2**32


class StepNoise(NamedTuple):
    """The noise of one step; the same for every rank, device and dtype."""

    seed: int
    sigma: float
    targets: dict[str, Target]
    step: int

    def factors(
        self, name: str, directions: Tensor, rows: slice = WHOLE, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Return A (D, *batch, p, r) and B (D, *batch, q, r) for `directions` (D,) int64 on any device.

        Entries are independent, zero-mean and of unit variance, except that B is 1 for full noise. `rows`: only those
        of a matrix's A.
        """
        target, num_directions = self.targets[name], len(directions)
        lead = math.prod(target.batch) * target.p * target.rank
        if rows == WHOLE:
            values = self._values(name, directions, (0, target.num_values), dtype)
            a, b = values[:, :lead], values[:, lead:]
        else:
            a = self._values(name, directions, (rows.start * target.rank, rows.stop * target.rank), dtype)
            b = self._values(name, directions, (lead, target.num_values), dtype)
        a = a.reshape(num_directions, *target.batch, -1, target.rank)
        if target.is_full:
            return a, a.new_ones(num_directions, 1, 1)
        return a, b.reshape(num_directions, *target.batch, target.q, target.rank)

    def scale(self, name: str) -> float:
        """Return the factor of A @ B.T in the perturbed weights: sigma * multiplier / sqrt(r)."""
        target = self.targets[name]
        return self.sigma * target.multiplier / math.sqrt(target.rank)

    def _values(self, name: str, directions: Tensor, span: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the table values of a span of each direction, (D, stop - start); exact in bf16 and fp16 too.

        Value v is byte v % 16 (lowest first) of the block v // 16.
        """
        counter = (self.step, *hash_key("perturbation", self.seed, name))
        first_block, skipped = divmod(span[0], _BYTES_PER_BLOCK)
        count, device = span[1] - span[0] + skipped, directions.device
        if fill_from_table is not None and device.type == "cpu":
            values = torch.empty(len(directions), count)
            numbers, table = np.array(counter, np.uint64), normal_table().numpy()
            fill_from_table(values.numpy(), first_block, directions.numpy(), numbers, table)
        elif (kernels := gpu_kernels(device)) is not None:
            values = torch.empty(len(directions), count, dtype=dtype, device=device)
            kernels.fill_from_table(values, first_block, directions, counter, normal_table(device).to(dtype))
        else:
            values = table_values(directions, counter, first_block, count)
        return values[:, skipped:].to(dtype)


@lru_cache(maxsize=4)
def gpu_kernels(device: torch.device) -> ModuleType | None:
    """Import the kernels that fill and round tensors of a GPU; None on other devices, and where Triton is missing."""
    if device.type != "cuda":
        return None
    try:
        from rwkv_es.noise import gpu_kernels as kernels
    except ImportError:
        return None
    return kernels


def table_values(directions: Tensor, counter: tuple[int, int, int], first_block: int, count: int) -> Tensor:
    """Return (D, count) table values for directions (D,), on their device: plain torch operations.

    counter: step and key. The first value is the first byte of the block `first_block`.
    """
    step, *key = counter
    num_blocks = -(-count // _BYTES_PER_BLOCK)
    blocks = directions.new_zeros(len(directions), num_blocks, 4)
    blocks[..., 0] = torch.arange(first_block, first_block + num_blocks, device=directions.device)
    blocks[..., 1] = directions[:, None]
    blocks[..., 2] = step
    words = philox(blocks, (key[0], key[1]))  # (D, blocks, 4)
    shifts = torch.arange(0, 32, 8, device=directions.device)
    table_index = (words[..., None] >> shifts) & 255  # (D, blocks, 4, 4)
    return normal_table(directions.device)[table_index.reshape(len(directions), -1)[:, :count]]


class Noise(NamedTuple):
    """The perturbations of a run."""

    seed: int
    targets: dict[str, Target]

    def at(self, step: int, sigma: float) -> StepNoise:
        """Return the noise of one step."""
        return StepNoise(self.seed, sigma, self.targets, step)


def sign(members: Tensor) -> Tensor:
    """Return s_n, +1 for even and -1 for odd members: (N,) int64 -> (N,) fp32."""
    return (1 - 2 * (members % 2)).float()
