"""The RWKV-7 state update of one token, for many rows."""

import torch
from torch import Tensor


def wkv_(state: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, *, kk: Tensor, a: Tensor) -> Tensor:
    """Update the state in place and read it: S <- S diag(w) - (S kk)(kk*a)^T + v k^T, y = S r.

    state (S,H,K_h,K_h) fp32 as [value, key]; r, w, k, v, kk, a (S,H,K_h) -> y (S,H,K_h), in the dtype of r.
    w is the decay in (0, 1), kk the normalised removal key, a the in-context learning rate.
    Source: RWKV-7 "Goose" (arXiv 2503.14456), eq. 17.
    """
    r32, w, k, v, kk, a = (t.float() for t in (r, w, k, v, kk, a))
    removed = torch.matmul(state, kk.unsqueeze(-1))  # (S,H,K_h,1)
    state.mul_(w.unsqueeze(-2))
    state.addcmul_(removed, (kk * a).unsqueeze(-2), value=-1)
    state.addcmul_(v.unsqueeze(-1), k.unsqueeze(-2))
    return torch.matmul(state, r32.unsqueeze(-1)).squeeze(-1).to(r.dtype)
