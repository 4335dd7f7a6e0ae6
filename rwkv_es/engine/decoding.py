"""What is asked of a token loop, and what it answers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from rwkv_es.config.option import MOST_NEW, MOST_SAMPLES
from rwkv_es.engine.scheduler import Request
from rwkv_es.engine.stops import Stops
from rwkv_es.model.batch import MULTIPLES, padded
from rwkv_es.model.sampler import SamplingParams
from rwkv_es.system.errors import ConfigError


class GenerationConfig(NamedTuple):
    """How completions are generated."""

    stops: Stops  # of requests that do not say
    sampling: SamplingParams = SamplingParams()
    slots: int = 256
    engine: str = "auto"  # or "torch", "numba", "triton"
    threads: int = 1  # of the numba engine
    row_multiple: int = MULTIPLES[0]  # of the rows in a matrix product, see `batch.examine`

    def padded(self, num_rows: int) -> int:
        """Round a number of rows up to what matrix products are given."""
        return padded(num_rows, self.row_multiple)


class Completion(NamedTuple):
    """What a request became. `tokens` holds everything sampled, a stop token too."""

    tokens: list[int]
    finish: str  # "stop" | "length" | "broken": the logits of the next token are not finite


OnFinished = Callable[[Mapping[int, Completion]], None]  # is told after every tick what has ended, by place in the list


class Partner(Protocol):
    """Who replies to answers, so that their requests go on."""

    def answered(self, ended: Mapping[int, Completion]) -> Collection[int]:
        """Take the answers that have ended, by place in the list. Returns the places that may go on: they wait."""

    def replies(self, wait: bool) -> Mapping[int, Request | None]:
        """Return how places go on that have waited, None: not at all. wait: there is nothing else to do."""


class Rollout(NamedTuple):
    """Completions in the order of their requests, and what they cost."""

    completions: list[Completion]
    num_ticks: int
    num_read: int  # tokens read by active rows: prompts and samples


def joined(before: Completion | None, completion: Completion) -> Completion:
    """Return all that a request became in several turns."""
    return completion if before is None else Completion([*before.tokens, *completion.tokens], completion.finish)


def refuse_too_much(requests: Sequence[Request]) -> None:
    """Refuse requests that would sample by the noise of others.

    Raises:
        ConfigError: one has more tokens or samples than there is noise for.
    """
    if (longest := max((request.max_new_tokens for request in requests), default=0)) > MOST_NEW:
        raise ConfigError(f"a completion may have at most {MOST_NEW} tokens; got a limit of {longest}")
    if (last := max((request.sample for request in requests), default=0)) >= MOST_SAMPLES:
        raise ConfigError(f"a problem may have at most {MOST_SAMPLES} samples of a member; got {last + 1}")


def next_shared_prefix(request: Request, num_read: int) -> int:
    """Return the length of the next prefix that is shared; -1: there is none."""
    return next((length for length in request.shared_prefixes if length > num_read), -1)
