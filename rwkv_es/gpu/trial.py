"""Whether the Triton engine may be used on its own account: it is there, it can, and it agrees with plain torch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rwkv_es.gpu import engine as gpu
from rwkv_es.gpu.layer import what_is_missing
from rwkv_es.gpu.operands import Reading, Texts
from rwkv_es.model import forward as torch_engine
from rwkv_es.model.batch import MULTIPLES
from rwkv_es.model.forward import Model, State, new_state, reset_rows_
from rwkv_es.model.weights import Factors, Weights

_ROWS, _TEXT = MULTIPLES[0], 8  # of a text, so many tokens are read at once
_MOST = {torch.float32: 1e-3, torch.bfloat16: 6e-2}  # relative; of bf16 torch rounds after every operation

_found: dict[tuple[object, ...], str] = {}  # what was found out, once per process


def reason_against(model: Model, factors: Factors | None) -> str:
    """Return why plain torch is used instead; "": it runs, and a few rows' logits are torch's up to rounding."""
    like = model.like
    if factors is not None:  # a few directions are enough
        a, b = ({name: factor[:2] for name, factor in side.items()} for side in (factors.a, factors.b))
        factors = factors._replace(a=a, b=b)
    key = model.arch, like.dtype, like.device, bool(model.scales), tuple(factors.scale) if factors else ()
    if key not in _found:
        _found[key] = _reason(model, factors)
    return _found[key]


def _reason(model: Model, factors: Factors | None) -> str:
    if missing := what_is_missing():
        return missing
    if not gpu.is_able(model, factors):
        return "it has no kernels for these weights or targets"
    try:
        apart = _difference(model, factors)
    except Exception as error:  # noqa: BLE001  compilers and drivers fail in many ways; torch goes on
        text = " ".join(str(error).split()) or type(error).__name__
        return f"its kernels cannot be made or run here: {text[:200]}"
    most = _MOST[model.like.dtype]
    return "" if apart <= most else f"its logits differ from torch's by {apart:.1%} of their size (at most {most:.1%})"


def _difference(model: Model, factors: Factors | None) -> float:
    """Let both engines read a few tokens in a few rows; return how far their logits are apart, of torch's size."""
    rows = torch.arange(_ROWS, device=model.like.device)
    weights = torch_engine.unperturbed(model)
    if factors is not None and factors.num_directions:
        weights = torch_engine.perturb(model, factors, 2 * factors.first + rows % (2 * factors.num_directions))
    expected = _logits(torch_engine, model, weights, partial(_one_by_one, model, weights))
    with gpu.running(model, factors, _ROWS * _TEXT) as engine:
        found = _logits(engine, model, weights, partial(read_at_once, engine, weights))
    return float((found - expected).norm() / expected.norm())


def _logits(engine: Any, model: Model, weights: Weights, read_text: Callable[[Tensor, State], None]) -> Tensor:
    """Return the logits of every row after one token, and after a text and another token."""
    rows, state, scores = torch.arange(_ROWS, device=model.like.device), new_state(model, _ROWS), []
    reset_rows_(state, weights, rows)
    tokens = torch.arange(_TEXT + 2, device=rows.device) * 104729 + rows[:, None] * 7919 + 1  # (S,T)
    tokens %= model.arch.n_vocab
    for column, text in ((tokens[:, 0], tokens[:, 1:-1]), (tokens[:, -1], tokens[:, :0])):
        scores.append(engine.logits(weights, engine.forward(weights, model.arch, column, state)))
        if text.numel():
            read_text(text, state)
    return torch.stack(scores)


def _one_by_one(model: Model, weights: Weights, text: Tensor, state: State) -> None:
    for column in text.T:
        torch_engine.forward(weights, model.arch, column, state)


def read_at_once(engine: gpu.GpuEngine, weights: Weights, text: Tensor, state: State) -> None:
    """Let every row of a state read all tokens of a text at once: (S,T)."""
    rows, num_tokens = text.shape
    slot = torch.arange(rows, device=text.device)
    live = torch.ones(text.numel(), dtype=torch.int32, device=text.device)
    texts, weights = Texts(slot, live[:rows] * num_tokens), weights.rows(slot.repeat_interleave(num_tokens))
    nobody = torch.zeros_like(live).long()
    direction = nobody if weights.direction is None else weights.direction
    sign = nobody.to(engine.model.like.dtype) if weights.sign is None else weights.sign
    engine.read_texts_(weights, Reading(texts, text.flatten(), direction, sign, live), state)
