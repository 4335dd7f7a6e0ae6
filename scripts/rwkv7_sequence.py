"""RWKV-7 (x070) over whole sequences, differentiable: the form that pretrain_tiny.py trains through.

The state recurrence is evaluated in chunks of 16 tokens as matrix products (the delta rule's triangular form), so that
autograd keeps one state per chunk. Legend: B rows, T tokens, L layers, H heads, C = H * 64, V vocabulary, G chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16
HEAD = 64
DECAY = -0.606531  # the published constant, -exp(-0.5) cut to six digits

Params = dict[str, Tensor]


def init_params(n_layer: int, n_embd: int, n_vocab: int, rank: int, seed: int) -> Params:
    """Draw random fp32 weights under the official names and shapes, in the order of RWKV-LM's trainer."""
    generator = torch.Generator().manual_seed(seed)
    p: Params = {"emb.weight": 0.3 * torch.randn(n_vocab, n_embd, generator=generator)}
    for layer in range(n_layer):
        block = f"blocks.{layer}."
        for name in ("ln1", "ln2", "ln0") if layer == 0 else ("ln1", "ln2"):
            p |= _init_norm(f"{block}{name}", n_embd)
        p |= _init_att(f"{block}att.", layer / max(n_layer - 1, 1), (n_embd, rank), generator)
        p[f"{block}ffn.x_k"] = _ramp(n_embd, 0.5)
        p[f"{block}ffn.key.weight"] = _fan_in(n_embd, 4 * n_embd, generator).t().contiguous()
        p[f"{block}ffn.value.weight"] = torch.zeros(n_embd, 4 * n_embd)
    p |= _init_norm("ln_out", n_embd)
    p["head.weight"] = 0.5 * _fan_in(n_embd, n_vocab, generator).t().contiguous()
    return p


def _init_norm(name: str, n_embd: int) -> Params:
    return {f"{name}.weight": torch.ones(n_embd), f"{name}.bias": torch.zeros(n_embd)}


def _init_att(att: str, depth: float, sizes: tuple[int, int], generator: torch.Generator) -> Params:
    """Draw one block's time mix; depth runs from 0 (first block) to 1, sizes are C and the low-rank pairs' rank."""
    n_embd, rank = sizes
    channel = torch.linspace(0, 1, n_embd).view(1, 1, n_embd)
    p: Params = {f"x_{c}": _ramp(n_embd, power) for c, power in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2))}
    start = {"w": -5.5 + 6 * channel ** (1 + depth**0.3), "a": channel * 0 - 0.19, "v": channel * 0 + 0.73}
    for c in "wav":  # the first factor is zero: at the start the vector alone decides
        p |= {f"{c}1": torch.zeros(n_embd, rank), f"{c}2": 0.1 * _fan_in(rank, n_embd, generator), f"{c}0": start[c]}
    p |= {"g1": _fan_in(n_embd, rank, generator), "g2": _fan_in(rank, n_embd, generator)}
    p |= {"k_k": channel * 0 + 0.71, "k_a": channel * 0 + 1.02, "r_k": torch.full((n_embd // HEAD, HEAD), -0.04)}
    for name in ("receptance", "key", "value"):
        p[f"{name}.weight"] = 0.5 * _fan_in(n_embd, n_embd, generator)
    p |= {"output.weight": torch.zeros(n_embd, n_embd), **_init_norm("ln_x", n_embd)}
    return {f"{att}{name}": tensor for name, tensor in p.items()}


def _fan_in(size_in: int, size_out: int, generator: torch.Generator) -> Tensor:
    """Draw a matrix (in,out) that keeps the scale of what it maps."""
    return torch.randn(size_in, size_out, generator=generator) * size_in**-0.5


def _ramp(n_embd: int, power: float) -> Tensor:
    """Return token-shift mixing (1,1,C) that differs from channel to channel: both tokens are seen from the start."""
    return (1 - torch.linspace(0, 1, n_embd) ** power).view(1, 1, n_embd)


def wkv_chunked(r: Tensor, logw: Tensor, k: Tensor, v: Tensor, *, kk: Tensor, b: Tensor, keep: Tensor) -> Tensor:
    """Return y (B,H,T,64) of S <- S diag(w) - (S kk) b^T + v k^T, y = S r, starting from S = 0.

    r, logw, k, v, kk, b (B,H,T,64), T a multiple of 16; keep (B,G) is 0 where a new sequence begins, else 1.
    Inside a chunk S_t = S'_t diag(P_t) with P the running product of decays, which turns the recurrence into
    (I + tril(K B^T)) U = K S0^T + tril(K k^T) V for the removed values U = S kk.
    """
    rows, heads, length, size = r.shape
    num_chunks = length // CHUNK

    def split(x: Tensor) -> Tensor:  # (B,H,T,64) -> (G,B*H,16,64)
        return x.reshape(rows * heads, num_chunks, CHUNK, size).transpose(0, 1).contiguous()

    logw, r, k, v, kk, b = (split(x) for x in (logw, r, k, v, kk, b))
    log_p = logw.cumsum(2)
    p = log_p.exp()
    r_in, kk_in, grow = r * p, kk * (log_p - logw).exp(), (-log_p).exp()
    out = torch.cat((k, b), 2) * torch.cat((grow, grow), 2)  # (G,BH,32,64)
    scores = torch.cat((r_in, kk_in), 2) @ out.transpose(2, 3)  # (G,BH,32,32)
    mask = torch.ones(CHUNK, CHUNK).tril()
    strict = mask.tril(-1)
    r_k, r_b = scores[:, :, :CHUNK, :CHUNK] * mask, scores[:, :, :CHUNK, CHUNK:] * mask
    kk_k, kk_b = scores[:, :, CHUNK:, :CHUNK] * strict, scores[:, :, CHUNK:, CHUNK:] * strict
    solve = _inverse(kk_b)
    # With S0 the chunk's first state: U = u_in S0^T + u_v, Y = y_in S0^T + y_v, last state = S0 step + add.
    u_in, u_v = solve @ kk_in, solve @ (kk_k @ v)
    y_in, y_v = r_in - r_b @ u_in, r_k @ v - r_b @ u_v
    last = p[:, :, -1:, :]  # (G,BH,1,64)
    k_out, b_out = out[:, :, :CHUNK] * last, out[:, :, CHUNK:] * last
    step = torch.diag_embed(last.squeeze(2)) - u_in.transpose(2, 3) @ b_out
    add = v.transpose(2, 3) @ k_out - u_v.transpose(2, 3) @ b_out
    keep = keep.t().repeat_interleave(heads, 1)[..., None, None]  # (G,BH,1,1)
    state = torch.zeros_like(add[0])
    ys = []
    for g in range(num_chunks):
        state = state * keep[g]
        ys.append(torch.baddbmm(y_v[g], y_in[g], state.transpose(1, 2)))
        state = torch.baddbmm(add[g], state, step[g])
    return torch.stack(ys, 1).reshape(rows, heads, length, size)


def _inverse(a: Tensor) -> Tensor:
    """Invert I + a for strictly lower triangular a (..., 16, 16): a^16 = 0, so four products are exact."""
    eye = torch.eye(CHUNK)
    a2 = a @ a
    a4 = a2 @ a2
    return (eye - a) @ (eye + a2) @ (eye + a4) @ (eye + a4 @ a4)


def _shift(x: Tensor, starts: Tensor) -> Tensor:
    """x (B,T,C): the previous token's vector, zero where a sequence begins (starts (B,T,1) bool)."""
    return F.pad(x, (0, 0, 1, -1)).masked_fill(starts, 0.0)


def _time_mix(p: Params, att: str, x: Tensor, v_first: Tensor | None, starts: Tensor) -> tuple[Tensor, Tensor]:
    rows, length, n_embd = x.shape
    heads = n_embd // HEAD
    delta = _shift(x, starts) - x
    xr, xw, xk, xv, xa, xg = (x + delta * p[f"{att}x_{c}"] for c in "rwkvag")
    r, k, v = (F.linear(i, p[f"{att}{n}.weight"]) for i, n in ((xr, "receptance"), (xk, "key"), (xv, "value")))
    log_decay = DECAY * torch.sigmoid(p[f"{att}w0"] + torch.tanh(xw @ p[f"{att}w1"]) @ p[f"{att}w2"])
    a = torch.sigmoid(p[f"{att}a0"] + xa @ p[f"{att}a1"] @ p[f"{att}a2"])
    g = torch.sigmoid(xg @ p[f"{att}g1"]) @ p[f"{att}g2"]
    kk = F.normalize((k * p[f"{att}k_k"]).view(rows, length, heads, HEAD), dim=-1).view(x.shape)
    k = k * (1 + (a - 1) * p[f"{att}k_a"])
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(p[f"{att}v0"] + xv @ p[f"{att}v1"] @ p[f"{att}v2"])

    def by_head(t: Tensor) -> Tensor:  # (B,T,C) -> (B,H,T,64)
        return t.view(rows, length, heads, HEAD).transpose(1, 2)

    keep = (~starts[:, ::CHUNK, 0]).to(x.dtype)
    y = wkv_chunked(*(by_head(t) for t in (r, log_decay, k, v)), kk=by_head(kk), b=by_head(kk * a), keep=keep)
    y = y.transpose(1, 2).reshape(rows * length, n_embd)
    y = F.group_norm(y, heads, p[f"{att}ln_x.weight"], p[f"{att}ln_x.bias"], eps=64e-5).view(x.shape)
    bonus = ((r * k).view(rows, length, heads, HEAD) * p[f"{att}r_k"]).sum(-1, keepdim=True)
    y = y + (bonus * v.view(rows, length, heads, HEAD)).view(x.shape)
    return F.linear(y * g, p[f"{att}output.weight"]), v_first


def _channel_mix(p: Params, ffn: str, x: Tensor, starts: Tensor) -> Tensor:
    k = x + (_shift(x, starts) - x) * p[f"{ffn}x_k"]
    return F.linear(F.relu(F.linear(k, p[f"{ffn}key.weight"])).square(), p[f"{ffn}value.weight"])


def forward(p: Params, tokens: Tensor, starts: Tensor) -> Tensor:
    """Return the hidden vectors before the head, (B,T,C), of tokens (B,T).

    starts (B,T) bool marks the first token of each packed sequence; starts lie on multiples of 16, T too.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    assert tokens.shape[1] % CHUNK == 0 and not starts.nonzero()[:, 1].fmod(CHUNK).any()
    starts = starts.unsqueeze(-1)
    x = norm(p["emb.weight"], "blocks.0.ln0")[tokens]
    v_first = None
    for layer in range(num_layers(p)):
        block = f"blocks.{layer}."
        y, v_first = _time_mix(p, f"{block}att.", norm(x, f"{block}ln1"), v_first, starts)
        x = x + y
        x = x + _channel_mix(p, f"{block}ffn.", norm(x, f"{block}ln2"), starts)
    return norm(x, "ln_out")


def num_layers(p: Params) -> int:
    """Count the blocks."""
    return 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
