"""Texts in, texts out: what a program of one's own asks of the token loop."""

from collections.abc import Sequence
from typing import overload

import torch

from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.engines import examined
from rwkv_es.engine.rollout import rollout
from rwkv_es.engine.scheduler import Request, with_shared_prefixes
from rwkv_es.engine.stops import cut, make_stops
from rwkv_es.model.forward import Model
from rwkv_es.model.sampler import SamplingParams
from rwkv_es.model.weights import BASE, Factors, Members
from rwkv_es.pretrained.tokenizer import Tokenizer
from rwkv_es.system.errors import ConfigError

_multiples: dict[tuple[object, ...], int] = {}  # of rows, by all that they follow from


@overload
def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    members: None = None,
    *,
    max_new_tokens: int = ...,
    stop: Sequence[str] = ...,
    stop_included: Sequence[str] = ...,
    sampling: SamplingParams = ...,
    slots: int = ...,
    engine: str = ...,
) -> list[str]: ...
@overload
def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    members: Members,
    *,
    max_new_tokens: int = ...,
    stop: Sequence[str] = ...,
    stop_included: Sequence[str] = ...,
    sampling: SamplingParams = ...,
    slots: int = ...,
    engine: str = ...,
) -> list[list[str]]: ...
def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    members: Members | None = None,
    *,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
    stop_included: Sequence[str] = (),
    sampling: SamplingParams = SamplingParams(),  # noqa: B008 - a value
    slots: int = 256,
    engine: str = "auto",
) -> list[str] | list[list[str]]:
    """Complete P prompts: [prompt], or with the N members of `ES.ask`, [member][prompt].

    A completion ends at the end token, before a `stop` string, after one of `stop_included`, or after `max_new_tokens`.
    `slots` generations are in flight at a time: memory against speed; the texts do not depend on it.

    Raises:
        ConfigError: a prompt is empty or cannot be expressed in the model's vocabulary, or the engine cannot be used.
    """
    encoded = [tuple(tokenizer.encode(prompt)) for prompt in prompts]
    if not all(encoded):
        raise ConfigError(f"prompt {encoded.index(())} is empty; a completion needs at least one token to start from")
    asked = BASE if members is None else members
    requests = [
        Request(member, index, prompt, max_new_tokens, step=asked.step)
        for member in asked.ids
        for index, prompt in enumerate(encoded)
    ]
    stops = make_stops(tokenizer, (*stop, *stop_included))
    decoding = GenerationConfig(stops, sampling, slots, engine, torch.get_num_threads())
    decoding = decoding._replace(row_multiple=_row_multiple(model, decoding, asked.factors))
    found = rollout(model, with_shared_prefixes(requests), decoding, asked.factors).completions
    texts = [cut(tokenizer.decode(completion.tokens), stop, stop_included) for completion in found]
    rows = [texts[start : start + len(prompts)] for start in range(0, len(texts), max(1, len(prompts)))]
    return texts if members is None else rows


def _row_multiple(model: Model, decoding: GenerationConfig, factors: Factors | None) -> int:
    """Return the multiple of rows that products need here; one kind of model is examined once."""
    targets = tuple((name, a.shape[-1]) for name, a in factors.a.items()) if factors is not None else ()
    kind = (model.arch, model.like.dtype, model.like.device, bool(model.scales), targets)
    key = (*kind, decoding.engine, decoding.slots, decoding.threads)
    if key not in _multiples:
        _multiples[key] = examined(model, decoding, factors).multiple
    return _multiples[key]
