"""`rwkv-es eval --text`: perplexity on a text file, and how far a tuned model has moved from its base there."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.config.options import Config
from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.engines import examined
from rwkv_es.engine.likelihood import Text, chosen, predict
from rwkv_es.engine.memory import DEFAULT_SLOTS
from rwkv_es.engine.stops import make_stops
from rwkv_es.model.batch import Verdict, say_advice
from rwkv_es.model.forward import Model
from rwkv_es.pretrained.tokenizer import END_ID, Tokenizer, load_tokenizer
from rwkv_es.session import open_model
from rwkv_es.system.errors import ConfigError
from rwkv_es.system.texts import read_text

CHUNK = 512  # tokens: every chunk is read from the start of a document, many at a time


class Reading(NamedTuple):
    """Sums over all tokens of a text, in nats: of each model, and of the first one to the last one."""

    num_tokens: int
    nll: list[float]  # negative log likelihood
    kl: float  # KL(first || last)


def drift(config: Config) -> dict[str, Any]:
    """Read the text file with the model and, if given, its base; print what each makes of it. Returns that.

    Raises:
        RwkvEsError: something cannot be loaded, the file is no text, or the models' tokens differ.
    """
    text = _read_text(config.text)
    paths, models, ids, tokenizer = _open(config, text)
    stops = make_stops(tokenizer, ())
    decoding = GenerationConfig(
        stops, slots=config.slots or DEFAULT_SLOTS, engine=config.engine, threads=torch.get_num_threads()
    )
    verdict = reduce(Verdict.joined, (examined(model, decoding) for model in models))
    say_advice(verdict)
    reading = read(models, ids, decoding._replace(row_multiple=verdict.multiple))
    num_bytes = len(text.encode())
    found = [
        {"model": str(path), **_of_model(nll, reading.num_tokens, num_bytes)} for path, nll in zip(paths, reading.nll)
    ]
    result: dict[str, Any] = {**found[-1], "text": config.text, "tokens": reading.num_tokens, "bytes": num_bytes}
    if config.base:
        result.update(base=found[0], kl_per_token=reading.kl / reading.num_tokens)
    print("\n".join(_table(result)))
    print(json.dumps(result))
    return result


def read(models: Sequence[Model], ids: Sequence[int], decoding: GenerationConfig) -> Reading:
    """Let models of one vocabulary predict every token, in chunks; the first of a chunk follows token 0."""
    starts = range(0, len(ids), CHUNK)
    texts = [Text((END_ID, *ids[start : start + CHUNK])) for start in starts]
    nll = torch.zeros(len(models), len(texts), dtype=torch.float64)  # of each chunk: so the slots order no sum
    kl = torch.zeros(len(texts), dtype=torch.float64)
    for tick in predict(models, texts, decoding):
        nll[:, tick.texts] -= torch.stack([chosen(logits, tick.targets) for logits in tick.logits]).cpu()
        if len(models) > 1:
            kl[tick.texts] += divergence(tick.logits[0], tick.logits[-1]).cpu()
    return Reading(len(ids), nll.sum(1).tolist(), kl.sum().item())


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return KL(first || second) in nats of every row's distribution: logits (n,V), (n,V) -> (n,) float64."""
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (first, second))
    return (p.exp() * (p - q)).sum(-1)


def with_base(config: Config) -> list[Config]:
    """Return the options for each model: first the base, if one is given; the initial state is the second one's."""
    base = [replace(config, model=config.base, state="")] if config.base else []
    return [*base, config]


def _open(config: Config, text: str) -> tuple[list[Path], list[Model], list[int], Tokenizer]:
    """Load the base (if given) and the model; both must cut the text into the same tokens."""
    paths: list[Path] = []
    models: list[Model] = []
    readings: list[list[int]] = []
    for each in with_base(config):
        path, _, model = open_model(each)
        tokenizer = load_tokenizer(config.tokenizer, path, model.arch.n_vocab)
        paths.append(path)
        models.append(model)
        readings.append(tokenizer.encode(text))
    if readings[0] != readings[-1] or models[0].arch.n_vocab != models[-1].arch.n_vocab:
        raise ConfigError(f"{config.base} and {config.model} have different tokens, so a text cannot compare them")
    return paths, models, readings[0], tokenizer


def _read_text(file: str) -> str:
    text = read_text(file, "text", 4 << 30)
    if not text:
        raise ConfigError(f"the text file {file} is empty")
    return text


def _of_model(nll: float, num_tokens: int, num_bytes: int) -> dict[str, float]:
    per_token = nll / num_tokens
    perplexity = math.exp(per_token) if per_token < 700 else math.inf
    return {"perplexity": perplexity, "nll_per_token": per_token, "bits_per_byte": nll / math.log(2) / num_bytes}


def _table(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['text']}: {result['tokens']} tokens, {result['bytes']} bytes, in chunks of {CHUNK} tokens"]
    columns = [("base", result["base"]), ("tuned", result)] if "base" in result else [("", result)]
    lines.append(" " * 18 + "".join(f"{title:>12}" for title, _ in columns))
    for name in ("perplexity", "nll_per_token", "bits_per_byte"):
        lines.append(f"{name:<18}" + "".join(f"{column[name]:>12.4f}" for _, column in columns))
    if "base" in result:
        lines.append(f"KL(base || tuned) = {result['kl_per_token']:.6f} nats per token")
    return lines
