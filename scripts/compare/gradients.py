"""What the policy-gradient methods share: texts in rows, the likelihood of their tokens, the clipped surrogate."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rwkv7_sequence import CHUNK, forward
from torch import Tensor

from rwkv_es.model.layout import Params

from .rates import falling
from .world import Answered

ROW_TOKENS = 4096  # in one pass, unless the settings say `row_tokens`: bounds the memory of the activations


class Texts(NamedTuple):
    """Prompts and completions side by side, padded at the end to a multiple of CHUNK."""

    places: list[int]  # in the list of completions
    tokens: Tensor  # (B,T) int64
    is_new: Tensor  # (B,T) bool: the tokens that the model wrote


def rows(answered: Answered, places: Sequence[int], most: int = ROW_TOKENS) -> Iterator[Texts]:
    """Yield the texts at `places` in batches of similar length, at most `most` tokens each (or one text)."""
    sizes = {place: _padded(len(answered.prompts[place]) + len(answered.completions[place])) for place in places}
    batch: list[int] = []
    for place in sorted(places, key=lambda place: sizes[place]):
        if batch and sizes[place] * (len(batch) + 1) > most:
            yield _texts(answered, batch, sizes[batch[-1]])
            batch = []
        batch.append(place)
    if batch:
        yield _texts(answered, batch, sizes[batch[-1]])


def _padded(length: int) -> int:
    return -(-length // CHUNK) * CHUNK


def _texts(answered: Answered, places: list[int], length: int) -> Texts:
    tokens = torch.zeros(len(places), length, dtype=torch.int64)
    is_new = torch.zeros(len(places), length, dtype=torch.bool)
    for row, place in enumerate(places):
        prompt, completion = answered.prompts[place], answered.completions[place]
        start, end = len(prompt), len(prompt) + len(completion)
        tokens[row, :end] = torch.tensor([*prompt, *completion])
        is_new[row, start:end] = torch.tensor(answered.is_own[place]) if answered.is_own else True
    return Texts(places, tokens, is_new)


def read(params: Params, texts: Texts) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of every token after the first, and the hidden vectors before: (B,T-1), (B,T-1,C)."""
    starts = torch.zeros_like(texts.is_new)
    starts[:, 0] = True
    hidden = forward(params, texts.tokens, starts)[:, :-1]
    logits = F.linear(hidden, params["head.weight"])
    chosen = logits.gather(-1, texts.tokens[:, 1:, None]).squeeze(-1)
    return chosen - logits.logsumexp(-1), hidden


def clipped(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return PPO's surrogate (arXiv 1707.06347, eq. 7), to be maximised."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def trainable(params: Params) -> Params:
    """Return a copy that collects gradients."""
    return {name: tensor.clone().requires_grad_() for name, tensor in params.items()}


def optimiser(tensors: Sequence[Tensor], settings: Mapping[str, Any]) -> torch.optim.AdamW:
    """Return AdamW without decay, as TRL uses it by default."""
    return torch.optim.AdamW(list(tensors), lr=settings["lr"], weight_decay=0.0)


def step_(optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], spent: float) -> None:
    """Take a step with the gradient cut to norm 1, by the rate of this share of the budget; forget the gradient."""
    for group in optimizer.param_groups:
        group["lr"] = settings["lr"] * falling(settings, spent)
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    torch.nn.utils.clip_grad_norm_(tensors, 1.0)
    optimizer.step()
    optimizer.zero_grad()
