"""Products of the blocks' matrices in fp8 (e4m3): weights and operands are rounded, each row by a scale of its own.

The weights stay as they are: what is rounded is a copy, made for a rollout or, in plain torch, for each product. The
head, the low-rank parameters and the perturbations are not touched.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_es.noise.factors import gpu_kernels
from rwkv_es.system.errors import ConfigError

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
_SMALLEST = 1e-12  # of a row's largest value: a row of zeros has a scale too
_CAPABILITY = (8, 9)


class Rounded(NamedTuple):
    """A matrix (n,i): values (n,i) fp8, times the scale (n,) fp32 of each row."""

    values: Tensor
    scale: Tensor


def refuse(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse weights and devices whose products cannot be made in fp8.

    Raises:
        ConfigError: this is one.
    """
    if dtype != torch.bfloat16:
        raise ConfigError("quantize fp8 needs weights in bf16; try --dtype bf16")
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < _CAPABILITY):
        raise ConfigError("quantize fp8 needs a GPU that multiplies fp8: NVIDIA L4, RTX 4090, H100 or newer")


def rounded(x: Tensor) -> Rounded:
    """Round a matrix (n,i), so that the largest value of each row becomes +-448."""
    if (kernels := gpu_kernels(x.device)) is not None:
        found = Rounded(torch.empty_like(x, dtype=DTYPE), x.new_empty(len(x), dtype=torch.float32))
        kernels.round_to_fp8(x, *found)
        return found
    scale = x.abs().amax(1).float().clamp_(min=_SMALLEST) / LARGEST
    return Rounded((x / scale[:, None]).to(DTYPE), scale)


def times(x: Tensor, matrix: Rounded, out: Tensor | None = None) -> Tensor:
    """Return `x @ W.T`, summed in fp32: x (S,i) bf16, W (o,i) -> (S,o) bf16."""
    (values, scale), turned = rounded(x), matrix.values.t()
    out = x.new_empty(len(x), len(matrix.values)) if out is None else out
    return torch._scaled_mm(values, turned, scale[:, None], matrix.scale[None, :], out_dtype=out.dtype, out=out)
