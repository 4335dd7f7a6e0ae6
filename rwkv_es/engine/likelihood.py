"""What models say of given texts: logits for every next token, many texts at a time through the same forward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.engines import Engine, engine_of
from rwkv_es.model.forward import Model, State, new_state, perturb, reset_rows_, unperturbed
from rwkv_es.model.weights import Factors, Weights
from rwkv_es.system.errors import ConfigError

NOT_FINITE = (
    "the model's logits are not finite: its weights are damaged or overflow; try --dtype fp32, or another checkpoint"
)


class Text(NamedTuple):
    """Token ids; those from `start` on (1 or more) are to be predicted, each from all that come before it."""

    ids: Sequence[int]
    start: int = 1
    member: int = -1  # who reads it; -1: the model as it is


class Predicted(NamedTuple):
    """One tick: the next token of some of the texts, and what the models think of it."""

    texts: np.ndarray  # (n,) which texts
    targets: Tensor  # (n,) int64 the tokens that come next
    logits: list[Tensor]  # of each model (n,V)


class TokenScore(NamedTuple):
    """A text's tokens from `start` on, taken together."""

    log_probability: float
    is_greedy: bool  # each is the likeliest one in its place


def score(model: Model, texts: Sequence[Text], decoding: GenerationConfig) -> list[TokenScore]:
    """Return the log probability of every text's tokens from its `start` on, in nats."""
    total, is_greedy = np.zeros(len(texts)), np.ones(len(texts), bool)
    for tick in predict([model], texts, decoding):
        logits = tick.logits[0]
        total[tick.texts] += chosen(logits, tick.targets).cpu().numpy()
        is_greedy[tick.texts] &= (logits.argmax(-1) == tick.targets).cpu().numpy()
    return [TokenScore(float(value), bool(flag)) for value, flag in zip(total, is_greedy)]


def log_likelihoods(
    model: Model,
    texts: Sequence[Text],
    decoding: GenerationConfig,
    factors: Factors | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Return the log probability of every text's tokens from its `start` on as its member sees them: (n,) in nats.

    NaN: its logits are not finite. The same text has the same bits in any company. `advance` is told how many texts
    have been read since the last time.
    """
    total, num_left = np.zeros(len(texts)), np.array([len(text.ids) - text.start for text in texts])
    for tick in predict([model], texts, decoding, factors):
        total[tick.texts] += _log_probability(tick.logits[0], tick.targets).cpu().numpy()
        num_left[tick.texts] -= 1
        advance(int((num_left[tick.texts] == 0).sum()))
    return np.where(np.isfinite(total), total, np.nan)


def chosen(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log probability of the targets (n,) under logits (n,V): (n,) float64.

    Raises:
        ConfigError: the logits are not finite.
    """
    found = _log_probability(logits, targets)
    if not found.isfinite().all():
        raise ConfigError(NOT_FINITE)
    return found


def _log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """Return (n,) float64: torch's log_softmax takes each row by itself, on any device."""
    return torch.log_softmax(logits.double(), -1).gather(-1, targets[:, None])[:, 0]


def predict(
    models: Sequence[Model], texts: Sequence[Text], decoding: GenerationConfig, factors: Factors | None = None
) -> Iterator[Predicted]:
    """Read texts with several models of one vocabulary side by side; every token from its text's start on comes once.

    Long texts go first; as many are read at a time as there are slots, so that rows of like length share a tick.
    `factors` must hold the directions of all members among the texts; None: they read with the models as they are.
    """
    assert all(text.start >= 1 for text in texts)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
    with ExitStack() as stack:
        num_rows = min(decoding.slots, len(texts))
        decoding = decoding._replace(slots=num_rows)
        engines = [stack.enter_context(engine_of(model, decoding, factors)) for model in models]
        readers = [_reader(engine, model, decoding) for engine, model in zip(engines, models)]
        for first in range(0, len(order), max(num_rows, 1)):
            group = order[first : first + num_rows]
            members = [texts[i].member for i in group]
            at_start = [reader.reset(factors, members) for reader in readers]
            yield from _read([texts[i] for i in group], np.array(group), at_start)


class _Reader(NamedTuple):
    """A model that reads, and the state of its rows."""

    engine: Engine
    model: Model
    weights: Weights
    state: State
    padded: Callable[[int], int]

    def read_(self, tokens: np.ndarray) -> Tensor:
        """Read one token per row of the first ones, in place: (S,) -> (S,C)."""
        rows = slice(len(tokens))
        inputs = torch.as_tensor(tokens, device=self.model.like.device)
        weights, state = self.weights.rows(rows), self.state.rows(rows)
        return self.engine.forward(weights, self.model.arch, inputs, state)

    def reset(self, factors: Factors | None, members: Sequence[int]) -> "_Reader":
        """Put every row at the start of a text, in place; return the reader whose first rows are these members."""
        num_rows, device = self.state.wkv.shape[1], self.model.like.device
        weights = self.weights
        if factors is not None:
            rows = torch.as_tensor(np.resize(members, num_rows), device=device)  # padding rows need one that is there
            weights = perturb(self.model, factors, rows)
        reset_rows_(self.state, weights, torch.arange(num_rows, device=device))
        return self._replace(weights=weights)

    def logits(self, x: Tensor, rows: np.ndarray) -> Tensor:
        """Apply the head to some rows of x (S,C): (n,V); products see a full multiple of rows."""
        whole = torch.as_tensor(np.resize(rows, self.padded(len(rows))), device=x.device)
        return self.engine.logits(self.weights.rows(whole), x[whole])[: len(rows)]


def _reader(engine: Engine, model: Model, decoding: GenerationConfig) -> _Reader:
    state = new_state(model, decoding.padded(decoding.slots))
    return _Reader(engine, model, unperturbed(model), state, decoding.padded)


def _read(texts: Sequence[Text], names: np.ndarray, readers: Sequence[_Reader]) -> Iterator[Predicted]:
    """Read texts in the order of falling length: active rows are always the first ones."""
    lengths, starts = np.array([len(text.ids) for text in texts]), np.array([text.start for text in texts])
    tokens = np.zeros((readers[0].padded(len(texts)), lengths.max(initial=0)), np.int64)
    for row, text in zip(tokens, texts):
        row[: len(text.ids)] = text.ids
    for place in range(1, tokens.shape[1]):
        num_active = int((lengths > place).sum())
        hidden = [reader.read_(tokens[: reader.padded(num_active), place - 1]) for reader in readers]
        rows = np.flatnonzero(starts[:num_active] <= place)
        if rows.size:
            targets = torch.as_tensor(tokens[rows, place], device=hidden[0].device)
            yield Predicted(names[rows], targets, [reader.logits(x, rows) for reader, x in zip(readers, hidden)])
