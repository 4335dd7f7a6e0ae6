"""What is asked of a token loop, and what it answers."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from rwkv_es.engine.batch import MULTIPLES, padded
from rwkv_es.engine.sampler import Sampling
from rwkv_es.engine.scheduler import Request
from rwkv_es.engine.stops import Stops

_SAMPLE_SHIFT = 20  # noise counter word 0 = position + sample << 20: up to a million tokens and 4096 samples


class Decoding(NamedTuple):
    """How completions are generated."""

    stops: Stops  # of requests that do not say
    sampling: Sampling = Sampling()
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


Hearing = Callable[[Mapping[int, Completion]], None]  # is told after every tick what has ended, by place in the list


class Rollout(NamedTuple):
    """Completions in the order of their requests, and what they cost."""

    completions: list[Completion]
    num_ticks: int
    num_read: int  # tokens read by active rows: prompts and samples


def counter_of(request: Request) -> tuple[int, int, int, int]:
    """Return the counter of the noise by which a request's first token is sampled; word 0 counts the tokens."""
    pair = request.member // 2 & 0xFFFFFFFF  # the unperturbed model has a number of its own
    return request.sample << _SAMPLE_SHIFT, request.problem, pair, request.step


def next_fork(request: Request, num_read: int) -> int:
    """Return the length of the next prefix that is shared; -1: there is none."""
    return next((length for length in request.forks if length > num_read), -1)
