"""The likelihood of reference answers as members see them: a reward that needs no sampling (objective logprob)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.likelihood import Text, log_likelihoods
from rwkv_es.model.forward import Model
from rwkv_es.model.weights import BASE, Members


class Reference(NamedTuple):
    """A problem's prompt with the answer that a model should give, and where that begins."""

    ids: tuple[int, ...]
    start: int
    num_bytes: int  # of the answer

    @property
    def num_tokens(self) -> int:
        """Count what is to be predicted."""
        return len(self.ids) - self.start


class Reading(NamedTuple):
    """What members make of P reference answers."""

    references: Sequence[Reference]
    log_likelihood: Tensor  # (M,P) float64, in nats; NaN: the logits are not finite

    @property
    def per_token(self) -> Tensor:
        """Return the mean log-likelihood of an answer's tokens: (M,P)."""
        return self.log_likelihood / torch.tensor([reference.num_tokens for reference in self.references])

    @property
    def table(self) -> Tensor:
        """Return for each answer and the first member its log-likelihood, tokens and bytes: (P,3) float64."""
        sizes = [(reference.num_tokens, reference.num_bytes) for reference in self.references]
        return torch.cat([self.log_likelihood[0][:, None], torch.tensor(sizes, dtype=torch.float64)], 1)

    @property
    def num_read(self) -> int:
        """Count the tokens read by all members: an answer's last one is only predicted."""
        return len(self.log_likelihood) * sum(len(reference.ids) - 1 for reference in self.references)


def read_references(
    model: Model,
    references: Sequence[Reference],
    decoding: GenerationConfig,
    members: Members = BASE,
    advance: Callable[[int], None] = lambda count: None,
) -> Reading:
    """Let every member read every prompt with its reference answer; `advance` is told how many it has read."""
    if not references:
        return Reading([], torch.zeros(len(members.ids), 0, dtype=torch.float64))
    texts = [Text(each.ids, each.start, member) for member in members.ids for each in references]
    found = log_likelihoods(model, texts, decoding, members.factors, advance)
    return Reading(references, torch.from_numpy(found).reshape(len(members.ids), len(references)))
