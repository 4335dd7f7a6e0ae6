"""RWKV-7 (x070) recurrent forward of one token for S rows, each under its own perturbation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rwkv_es.model.layout import Arch, Params
from rwkv_es.model.weights import Factors, Weights
from rwkv_es.model.wkv import wkv_
from rwkv_es.noise.factors import StepNoise, sign

can_read_ahead = True  # see `engines.Engine`, whose reference this module is
_LOG_DECAY = -0.606531  # -exp(-1/2): the decay is exp(_LOG_DECAY * sigmoid(.))


class Model(NamedTuple):
    """Weights in the dtype and on the device of the engine, and what was inferred from them."""

    params: Params
    arch: Arch
    scales: Mapping[str, Tensor] = {}  # of the matrices held as int8: (o,) fp32
    state_dtype: torch.dtype = torch.float32  # how rows' states are stored, fp32 or fp16
    source: Path | None = None  # the file that it was loaded from
    is_fp8: bool = False  # whether the blocks' matrices are multiplied in fp8; see `model.fp8`

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Read a text, its tokens one after the other, and return the logits of what follows: (T,) -> (V,) fp32."""
        tokens = torch.as_tensor(token_ids, dtype=torch.int64, device=self.like.device)
        state, weights = new_state(self, 1), unperturbed(self)
        reset_rows_(state, weights, torch.zeros(1, dtype=torch.int64, device=tokens.device))
        return logits(weights, forward(weights, self.arch, tokens, state)[-1:])[0]

    @property
    def like(self) -> Tensor:
        """A parameter that is never int8: it has the engine's dtype and device."""
        return self.params["ln_out.weight"]


def with_initial_state(model: Model) -> Model:
    """Return the model with a zero initial state (H,K_h,K_h) per layer, where it has none: something to tune."""
    arch, like = model.arch, model.like
    names = [f"blocks.{i}.att.time_state" for i in range(arch.n_layer)]
    zeros = {name: like.new_zeros(arch.n_head, arch.head_size, arch.head_size) for name in names}
    return model._replace(params={**model.params, **zeros}) if names[0] not in model.params else model


class State(NamedTuple):
    """The recurrent state of S rows."""

    att_shift: Tensor  # (L,S,C)
    wkv: Tensor  # (L,S,H,K_h,K_h) fp32 or fp16, as [key, value]
    ffn_shift: Tensor  # (L,S,C)

    def rows(self, rows: slice) -> "State":
        """Return views of the chosen rows."""
        return State(*(part[:, rows] for part in self))

    def copy_rows_(self, rows: Tensor, source: "State", source_rows: Tensor) -> None:
        """Copy rows of a state into other rows, of this one, in place: (R,) and (R,) int64."""
        for part, source_part in zip(self, source):
            if part.device.type == "cpu":  # measured: four times as fast as by indices
                to, start = (tensor.view(torch.uint8).numpy() for tensor in (part, source_part))  # any dtype
                for row, source_row in zip(rows.tolist(), source_rows.tolist()):
                    to[:, row] = start[:, source_row]
            else:
                for layer, source_layer in zip(part, source_part):  # a layer's copy at a time
                    layer.index_copy_(0, rows, source_layer.index_select(0, source_rows))


def new_state(model: Model, num_rows: int) -> State:
    """Return the zero state of `num_rows` rows, on the model's device; the shifts take its dtype."""
    arch, like = model.arch, model.like
    shift = like.new_zeros(arch.n_layer, num_rows, arch.n_embd)
    heads = (arch.n_layer, num_rows, arch.n_head, arch.head_size, arch.head_size)
    return State(shift, torch.zeros(heads, dtype=model.state_dtype, device=like.device), shift.clone())


def draw_factors(noise: StepNoise, model: Model, directions: range) -> Factors:
    """Draw A and B of every target for a range of directions, in the model's dtype and on its device."""
    index, dtype = torch.arange(directions.start, directions.stop, device=model.like.device), model.like.dtype
    factors = Factors(directions.start, {}, {}, {})
    for name in noise.targets:  # one by one, so that no more than one is held twice
        factors.a[name], factors.b[name] = noise.factors(name, index, dtype=dtype)
        factors.scale[name] = noise.scale(name)
    return factors


def unperturbed(model: Model) -> Weights:
    """Return the weights as they are."""
    return Weights(model.params, scales=model.scales, is_fp8=model.is_fp8)


def perturb(model: Model, factors: Factors, members: Tensor) -> Weights:
    """Return the weights as rows of `members` (S,) int64 see them."""
    signs = sign(members).to(model.like.dtype)
    return Weights(model.params, factors, members // 2 - factors.first, signs, model.scales, model.is_fp8)


def reset_rows_(state: State, weights: Weights, rows: Tensor) -> None:
    """Set `rows` (R,) of the state, in place, to the start of a text; `weights` are as those rows see them."""
    for part in state:
        part[:, rows] = 0
    for layer in range(len(state.wkv)):
        initial = weights.initial_wkv(layer)
        if initial is not None:
            state.wkv[layer, rows] = initial.mT.to(state.wkv.dtype)


def forward(weights: Weights, arch: Arch, tokens: Tensor, state: State) -> Tensor:
    """Read one token per row: tokens (S,) int64 -> (S,C) for `logits`. The state (S rows) is updated in place.

    If the state has one row only, it reads all the tokens, one after the other: (T,) -> (T,C).
    """
    x = layer_norm(weights, weights.embed(tokens), "blocks.0.ln0")
    v_first = x  # layer 0 sets it
    for i in range(arch.n_layer):
        layer = State(state.att_shift[i], state.wkv[i], state.ffn_shift[i])
        x_att = layer_norm(weights, x, f"blocks.{i}.ln1")
        y, v_first = time_mix(weights, arch, i, x_att, (layer, v_first))
        x = x + y
        x = x + channel_mix(weights, i, layer_norm(weights, x, f"blocks.{i}.ln2"), layer.ffn_shift)
    return layer_norm(weights, x, "ln_out")


def logits(weights: Weights, x: Tensor) -> Tensor:
    """Apply the LM head: x (S,C) -> (S,V) fp32."""
    return weights.logits(x)


def layer_norm(weights: Weights, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
    """Normalise over the last dimension, then weight and bias: x (S,...,C) -> (S,...,C)."""
    weight, bias = weights.vector(f"{name}.weight"), weights.vector(f"{name}.bias")
    if weight.dim() == 1 and bias.dim() == 1:
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return functional.layer_norm(x, x.shape[-1:], eps=eps) * weight + bias


def time_mix(weights: Weights, arch: Arch, i: int, x: Tensor, carried: tuple[State, Tensor]) -> tuple[Tensor, Tensor]:
    """RWKV-7 time mixing of one token (`RWKV_x070_TMix_one` of the rwkv package): x (S,C) -> (S,C), v_first (S,C).

    carried: this layer's state (updated in place) and layer 0's value.
    """
    state, v_first = carried
    att = f"blocks.{i}.att."
    shift = _renewed_(state.att_shift, x) - x
    xr, xw, xk, xv, xa, xg = (x + shift * weights.vector(f"{att}x_{c}") for c in "rwkvag")

    r = weights.linear(xr, att + "receptance.weight")
    k = weights.linear(xk, att + "key.weight")
    v = weights.linear(xv, att + "value.weight")
    w = _pair(weights, xw, att + "w", torch.tanh) + weights.vector(att + "w0")
    w = torch.exp(_LOG_DECAY * torch.sigmoid(w.float()))
    a = torch.sigmoid(_pair(weights, xa, att + "a") + weights.vector(att + "a0"))
    g = _pair(weights, xg, att + "g", torch.sigmoid)
    if i == 0:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(_pair(weights, xv, att + "v") + weights.vector(att + "v0"))

    heads = (len(x), arch.n_head, arch.head_size)
    kk = functional.normalize((k * weights.vector(att + "k_k")).view(heads), dim=-1)
    k = k * (1 + (a - 1) * weights.vector(att + "k_a"))
    r, w, k, v_heads, a = (t.view(heads) for t in (r, w, k, v, a))
    y = wkv_(state.wkv, r, w, k, v_heads, kk=kk, a=a)
    y = _group_norm(weights, y, att + "ln_x")
    bonus = (r * k * weights.vector(att + "r_k").view(-1, *heads[1:])).sum(-1, keepdim=True) * v_heads
    return weights.linear((y + bonus.flatten(1)) * g, att + "output.weight"), v_first


def channel_mix(weights: Weights, i: int, x: Tensor, shifted: Tensor) -> Tensor:
    """RWKV-7 channel mixing of one token: x (S,C) -> (S,C). `shifted` (S,C) is updated in place."""
    ffn = f"blocks.{i}.ffn."
    mixed = x + (_renewed_(shifted, x) - x) * weights.vector(ffn + "x_k")
    return weights.linear(torch.relu(weights.linear(mixed, ffn + "key.weight")).square(), ffn + "value.weight")


def _renewed_(shifted: Tensor, x: Tensor) -> Tensor:
    """Return `shifted` (S,C), what x (S,C) follows; in place it becomes x. Of one row (1,C), x are all its tokens."""
    before = torch.cat((shifted, x[:-1])) if len(shifted) < len(x) else shifted.clone()
    shifted.copy_(x[-len(shifted) :])
    return before


def _pair(weights: Weights, x: Tensor, name: str, activation=lambda x: x) -> Tensor:  # type: ignore[no-untyped-def]
    """Apply a low-rank pair: activation(x @ w1) @ w2, x (S,C) -> (S,C)."""
    return weights.project(activation(weights.project(x, name + "1")), name + "2")


def _group_norm(weights: Weights, y: Tensor, name: str) -> Tensor:
    """Normalise each head, then ln_x's weight and bias: y (S,H,K_h) -> (S,C)."""
    normal = functional.layer_norm(y, y.shape[-1:], eps=64e-5).flatten(1)
    return normal * weights.vector(name + ".weight") + weights.vector(name + ".bias")
