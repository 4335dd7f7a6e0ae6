"""What has been written is read back before it counts: its tensors and its logits are those in memory."""

from pathlib import Path

import torch
from torch import Tensor

from rwkv_es.model.forward import Model
from rwkv_es.model.layout import Arch, Params, infer
from rwkv_es.pretrained import checkpoint
from rwkv_es.system.errors import CheckpointError

_NUM_TOKENS = 8
_TOLERANCE = 2e-5  # of the largest logit: products of the same numbers at other addresses may add in another order


def check_written(path: Path, params: Params) -> None:
    """Compare a written model with the weights in memory: all its tensors by their bits, its logits after a few tokens.

    Block 0's value mix, which nothing reads, may be missing.

    Raises:
        CheckpointError: it cannot be read, or differs.
    """
    found = checkpoint.read(path)
    for name, tensor in params.items():
        if name not in found and not name.startswith("blocks.0.att.v"):
            raise _differs(f"lacks {name}")
        if name in found and not _is_same(found[name], tensor):
            raise _differs(f"has other values in {name}")
    if len(found) > len(params):
        raise _differs("has more tensors")
    if "emb.weight" in params:
        arch = infer(path, params)
        ours, theirs = logits_of(params, arch), logits_of(found, arch)
        if not (ours - theirs).abs().max() <= _TOLERANCE * ours.abs().max().clamp(min=1):
            raise _differs("answers with other logits")


def logits_of(params: Params, arch: Arch) -> Tensor:
    """Return the logits after a few fixed tokens, computed in fp32, one tensor at a time: (V,)."""
    return Model(_InFloats(params), arch).logits([7 * i % arch.n_vocab for i in range(1, 1 + _NUM_TOKENS)])


class _InFloats(dict[str, Tensor]):
    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name).to(torch.float32, copy=True)


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b.to(a.device))


def _differs(how: str) -> CheckpointError:
    return CheckpointError(
        f"the export {how} when it is read back, so nothing of it was kept; check the disk and the memory, and export "
        "again"
    )
