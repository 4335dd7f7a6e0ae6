"""Logits to tokens: greedy, or sampled with noise from counters."""

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_es.config.groups import DEFAULT_PENALTY_DECAY, DecodingOptions
from rwkv_es.noise.factors import hash_key, uniform


class SamplingParams(NamedTuple):
    """How tokens are chosen. Temperature 0 is greedy; top_k 0 means all tokens, min_p 0 too."""

    seed: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0  # see `penalties`
    frequency_penalty: float = 0.0
    penalty_decay: float = DEFAULT_PENALTY_DECAY

    @classmethod
    def of(cls, config: DecodingOptions, seed: int) -> "SamplingParams":
        """Return what the options say."""
        return cls(seed, *(getattr(config, name) for name in cls._fields[1:]))

    @property
    def is_cut(self) -> bool:
        """Say whether only some of the tokens may be sampled."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def has_penalties(self) -> bool:
        """Say whether what a row has written matters."""
        return bool(self.presence_penalty or self.frequency_penalty)


def sample(logits: Tensor, sampling: SamplingParams, counter: Tensor) -> Tensor:
    """Choose one token per row: logits (S,V), counter (S,4) int64 -> (S,) int64.

    The choice depends on the row's logits and counter alone: by inverting the distribution function at one uniform
    number per token, so that rows with equal counters (mirrored members) share their luck. Ties go to the lowest id.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    if len(logits) == 1:  # a GPU sums a single row in another order than one of several
        return sample(logits.expand(2, -1), sampling, counter.expand(2, -1))[:1]
    probability = torch.softmax(logits.double() / sampling.temperature, -1)
    if sampling.top_k or sampling.top_p < 1:
        probability = _keep_likeliest(probability, sampling)
    if sampling.min_p:
        least = sampling.min_p * probability.amax(-1, keepdim=True)
        probability = probability.masked_fill(probability < least, 0)
    cumulative = probability.cumsum(-1)
    point = uniform(counter, hash_key("sampling", sampling.seed)) * cumulative[:, -1]
    chosen = torch.searchsorted(cumulative, point[:, None], right=True).squeeze(-1)
    # Rounding may put the point at the very end, behind the last token that has any probability.
    last = probability.shape[-1] - 1 - (probability.flip(-1) > 0).double().argmax(-1)
    return torch.minimum(chosen, last)


def largest(logits: Tensor, tokens: Tensor, sampling: SamplingParams) -> Tensor:
    """Return each row's largest logit, NaN if there is one: logits (S,V), the chosen tokens (S,) -> (S,)."""
    if sampling.temperature == 0:  # the chosen one, which argmax takes to be a NaN where there is one
        return logits.gather(-1, tokens[:, None])[:, 0]
    return logits.amax(-1)


def _keep_likeliest(probability: Tensor, sampling: SamplingParams) -> Tensor:
    """Zero all but the top_k likeliest tokens, and of these all behind the first top_p of mass: (S,V) -> (S,V)."""
    ordered, order = torch.sort(probability, dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = 0
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= sampling.top_p * ordered.sum(-1, keepdim=True), 0)
    return torch.zeros_like(probability).scatter(-1, order, ordered)
