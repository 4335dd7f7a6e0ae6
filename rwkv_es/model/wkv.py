"""The RWKV-7 state update of one token, for many rows."""

import torch
from torch import Tensor


def wkv_(state: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, *, kk: Tensor, a: Tensor) -> Tensor:
    """Update the state in place and read it: S <- S diag(w) - (S kk)(kk*a)^T + v k^T, y = S r, computed in fp32.

    state (S,H,K_h,K_h) fp32 or fp16 as [key, value], S transposed; r, w, k, v, kk, a (S,H,K_h) -> y (S,H,K_h), in the
    dtype of r. w is the decay in (0, 1), kk the normalised removal key, a the in-context learning rate.
    With the state of one row and several r, w, ..., these are read one after the other.
    Source: RWKV-7 "Goose" (arXiv 2503.14456), eq. 17.
    """
    if len(state) < len(r):
        tokens = zip(*(t.split(1) for t in (r, w, k, v, kk, a)))
        return torch.cat([wkv_(state, *token[:4], kk=token[4], a=token[5]) for token in tokens])
    r32, w, k, v, kk, a = (t.float() for t in (r, w, k, v, kk, a))
    new = state.float()  # the state itself if it is fp32
    removed = torch.matmul(kk.unsqueeze(-2), new)  # (S,H,1,K_h)
    new.mul_(w.unsqueeze(-1))
    new.addcmul_((kk * a).unsqueeze(-1), removed, value=-1)
    new.addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
    if new is not state:
        state.copy_(new)
    return torch.matmul(r32.unsqueeze(-2), new).squeeze(-2).to(r.dtype)
