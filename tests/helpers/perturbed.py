"""Noise for the fused engines, and decoding that keeps the state."""

import torch
from models import KINDS

from rwkv_es.model.forward import new_state, reset_rows_
from rwkv_es.noise.factors import Noise, select

FUSED_KINDS = list(KINDS)  # on a CPU
GPU_KINDS = [kind for kind in KINDS if kind not in ("vectors", "everything")]


def noise_of(model, targets, rank):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.params.items()}
    return Noise(0, select(shapes, targets, rank)).at(step=2, sigma=0.05)


def decode(engine, model, tokens, weights):
    state = new_state(model, len(tokens))
    reset_rows_(state, weights, torch.arange(len(tokens)))
    out = [engine.logits(weights, engine.forward(weights, model.arch, column, state)) for column in tokens.T]
    return torch.stack(out, 1), state
