"""A class for lm-evaluation-harness (`pip install 'rwkv-es[eval]'`): its tasks, scored on this package's engine.

`lm_eval.simple_evaluate(RwkvLM(model="rwkv7-....pth"), tasks=["lambada_openai"])`
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from rwkv_es.config.options import build
from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.engines import examined
from rwkv_es.engine.likelihood import Text, score
from rwkv_es.engine.memory import DEFAULT_SLOTS
from rwkv_es.engine.rollout import rollout
from rwkv_es.engine.scheduler import Request, with_shared_prefixes
from rwkv_es.engine.stops import cut, make_stops
from rwkv_es.model.batch import MULTIPLES, say_advice
from rwkv_es.model.sampler import SamplingParams
from rwkv_es.pretrained.tokenizer import END_ID, Tokenizer, load_tokenizer
from rwkv_es.session import open_model
from rwkv_es.system.errors import ConfigError

MAX_NEW_TOKENS = 256  # tokens, if a task does not set it: the harness's own default
_MAX_NEW_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one counts
_KNOWN = {"until", "do_sample", "temperature", "top_p", "top_k", *_MAX_NEW_NAMES}
GREEDY = SamplingParams()
_ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}


@register_model("rwkv-es")
class RwkvLM(LM):
    """A checkpoint as the harness sees it; options are those of `rwkv-es eval`, batch_size means slots."""

    def __init__(self, model: str = "tiny", batch_size: Any = None, max_batch_size: Any = None, **options: Any) -> None:
        super().__init__()
        self.row_multiple = MULTIPLES[0]
        if str(batch_size).isdigit():
            options.setdefault("slots", int(batch_size))
        self.config = build({"model": model, **options}, "eval")
        self.path, _, self.model = open_model(self.config)
        self.tokenizer: Tokenizer = load_tokenizer(self.config.tokenizer, self.path, self.model.arch.n_vocab)
        verdict = examined(self.model, self._decoding())
        say_advice(verdict)
        self.row_multiple = verdict.multiple

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) the continuation's log probability, and whether greedy gives it."""
        texts = [split(self.tokenizer, request.args[0], request.args[1], self.config.bos) for request in requests]
        found = [tuple(each) for each in score(self.model, texts, self._decoding())]
        self._cache("loglikelihood", requests, found)
        return found  # type: ignore[return-value]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Return each text's log probability after token 0; a text of any length is read in one piece."""
        texts = [Text((END_ID, *self.tokenizer.encode(request.args[0]))) for request in requests]
        found = [each.log_probability for each in score(self.model, texts, self._decoding())]
        self._cache("loglikelihood_rolling", requests, found)
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return what follows each (context, options), up to the first of its `until` strings."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        found = [""] * len(requests)
        for options, places in groups.items():
            for place, text in zip(places, self._generate([requests[i].args[0] for i in places], json.loads(options))):
                found[place] = text
        self._cache("generate_until", requests, found)
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation as these models were trained: turns of System, User and Assistant."""
        turns = [f"{_ROLES[turn['role']]}: {turn['content'].strip()}" for turn in chat_history]
        return "\n\n".join([*turns, "Assistant:"] if add_generation_prompt else turns)

    @property
    def tokenizer_name(self) -> str:
        """What distinguishes tokenizer and chat template."""
        return f"rwkv-es-{self.tokenizer.n_vocab}"

    def _generate(self, contexts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        until, max_new_tokens, sampling = read_options(options, self.config.seed)
        prompts = [self._prompt(context) for context in contexts]
        asked = with_shared_prefixes([Request(-1, i, prompt, max_new_tokens) for i, prompt in enumerate(prompts)])
        completions = rollout(self.model, asked, self._decoding(until, sampling)).completions
        return [cut(self.tokenizer.decode(completion.tokens), until) for completion in completions]

    def _prompt(self, context: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer.encode(context))
        return (END_ID, *ids) if self.config.bos or not ids else ids

    def _decoding(self, until: Sequence[str] = (), sampling: SamplingParams = GREEDY) -> GenerationConfig:
        stops, config = make_stops(self.tokenizer, until), self.config
        found = GenerationConfig(stops, sampling, config.slots or DEFAULT_SLOTS, config.engine, torch.get_num_threads())
        return found._replace(row_multiple=self.row_multiple)

    def _cache(self, name: str, requests: Sequence[Any], found: Sequence[Any]) -> None:
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial(name, request.args, answer)


def split(tokenizer: Tokenizer, context: str, continuation: str, has_bos: bool = False) -> Text:
    """Return the tokens of context + continuation; those to be predicted begin with the first that reaches past the
    context, even if it begins inside it. Token 0 comes first if there would be nothing to predict from.
    """
    ids = tokenizer.encode(context + continuation)
    num_context_bytes, num_bytes, start = len(context.encode("utf-8", "replace")), 0, 0
    for token in ids:
        num_bytes += len(tokenizer.token_bytes[token])
        if num_bytes > num_context_bytes:
            break
        start += 1
    return Text((END_ID, *ids), start + 1) if has_bos or start == 0 else Text(ids, start)


def read_options(options: Mapping[str, Any], seed: int) -> tuple[tuple[str, ...], int, SamplingParams]:
    """Return a task's generation options: where to stop, the longest answer, how to sample.

    Raises:
        ConfigError: one that is not known here.
    """
    if unknown := sorted(set(options) - _KNOWN):
        raise ConfigError(f"unknown generation option {unknown[0]!r}; it may be {', '.join(sorted(_KNOWN))}")
    until = options.get("until") or []
    until = (until,) if isinstance(until, str) else tuple(until)
    max_new_tokens = next((options[name] for name in _MAX_NEW_NAMES if options.get(name) is not None), MAX_NEW_TOKENS)
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample") is None:
        is_sampled = temperature > 0
    else:
        is_sampled = bool(options["do_sample"])
        temperature = temperature or 1.0
    sampling = SamplingParams(seed, temperature, float(options.get("top_p") or 1.0), int(options.get("top_k") or 0))
    return until, int(max_new_tokens), sampling if is_sampled else SamplingParams(seed)
