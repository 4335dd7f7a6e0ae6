"""Penalties on what an answer has written already, as in the rwkv package's `PIPELINE.generate`.

A token that a row has written loses `presence + occurrence * frequency` of its logit. Its occurrence grows by one each
time it is written (blanks and digits: by nothing) and fades by `decay` with every token. It is kept at the place where
the row wrote the token first: (S,N) numbers, not (S,V); the places where it came again hold -inf.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_es.model.sampler import SamplingParams

_UNCOUNTED = b" \t0123456789"


class Text(NamedTuple):
    """What some rows have written, and how often."""

    written: Tensor  # (S,N) int32 or int64
    length: Tensor  # (S,) int64: so many places hold a token
    occurrence: Tensor  # (S,N) fp64, by the place of a token's first time; -inf: it was there before


def counted(token_bytes: Sequence[bytes], device: torch.device | str = "cpu") -> Tensor:
    """Return what a token adds to its occurrence, (V,) fp64: 0 for blanks and digits, else 1."""
    return torch.tensor([float(data not in _UNCOUNTED) for data in token_bytes], dtype=torch.float64, device=device)


def penalise_(scores: Tensor, text: Text, sampling: SamplingParams) -> None:
    """Take its penalty off the logit of each token that a row has written: scores (S,V) fp32, in place.

    Every logit has at most one penalty that is not 0, so that the order of the additions changes nothing.
    """
    places = torch.arange(text.written.shape[1], device=scores.device)
    is_first = (places < text.length[:, None]) & (text.occurrence >= 0)
    penalty = sampling.presence_penalty + text.occurrence * sampling.frequency_penalty
    scores.scatter_add_(1, text.written.long(), -penalty.masked_fill(~is_first, 0).to(scores.dtype))


def note_(text: Text, tokens: Tensor, amounts: Tensor, sampling: SamplingParams) -> None:
    """Let every row write a token at its next place, in place: tokens (S,), below 0: none; amounts (V,) of `counted`.

    The lengths stay as they are.
    """
    places, writes = torch.arange(text.written.shape[1], device=tokens.device), (tokens >= 0)[:, None]
    is_again = writes & (places < text.length[:, None]) & (text.written == tokens[:, None]) & (text.occurrence >= 0)
    amount = amounts[tokens.clamp(min=0).long()][:, None]  # (S,1)
    faded = torch.where(writes, text.occurrence * sampling.penalty_decay, text.occurrence)
    faded += is_again * amount
    is_here = writes & (places == text.length[:, None])
    first = torch.where(is_again.any(1, keepdim=True), -torch.inf, amount)
    text.occurrence.copy_(torch.where(is_here, first, faded))
    text.written.copy_(torch.where(is_here, tokens[:, None].to(text.written.dtype), text.written))


def penalties_of(
    sampling: SamplingParams, token_bytes: Sequence[bytes], size: tuple[int, int], device: torch.device
) -> "Penalties | None":
    """Return penalties on texts of size (rows, tokens), if there are any; `token_bytes` are the vocabulary."""
    return Penalties(sampling, counted(token_bytes, device), *size) if sampling.has_penalties else None


class Penalties:
    """The texts of all slots, of which a tick sees some rows."""

    def __init__(self, sampling: SamplingParams, amounts: Tensor, num_rows: int, longest: int) -> None:
        device = amounts.device
        self.sampling, self.amounts = sampling, amounts
        self.written = torch.zeros(num_rows, max(longest, 1), dtype=torch.int64, device=device)
        self.occurrence = torch.zeros_like(self.written, dtype=torch.float64)
        self.length = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def start_(self, row: int) -> None:
        """Forget what a row has written."""
        self.length[row] = 0

    def move(self, target: Tensor, source: Tensor) -> None:
        """Move rows to other slots."""
        for column in (self.written, self.occurrence, self.length):
            column[target] = column[source]

    def penalise_(self, scores: Tensor, rows: Tensor) -> None:
        """Penalise the logits of some rows, in place: (n,V), rows (n,) int64."""
        penalise_(scores, self._text(rows), self.sampling)

    def note_(self, rows: Tensor, tokens: Tensor) -> None:
        """Note what some rows have written: rows (n,) int64, tokens (n,) int64."""
        text = self._text(rows)
        note_(text, tokens, self.amounts, self.sampling)
        width = text.written.shape[1]
        self.written[rows, :width], self.occurrence[rows, :width] = text.written, text.occurrence
        self.length[rows] += 1

    def _text(self, rows: Tensor) -> Text:
        """Return a copy of the rows, as far as anybody has written and one place more."""
        length = self.length[rows]
        width = min(int(length.max()) + 1, self.written.shape[1]) if len(rows) else 1
        return Text(self.written[rows, :width], length, self.occurrence[rows, :width])
