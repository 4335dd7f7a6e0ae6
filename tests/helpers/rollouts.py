"""Requests of a vocabulary of 64 tokens that never stop by themselves."""

import numpy as np
from models import random_tokens

from rwkv_es.engine.scheduler import Request
from rwkv_es.engine.stops import Stops
from rwkv_es.model.sampler import SamplingParams

V = 64


NEVER = Stops(end_id=-1, strings=(), can_end=np.zeros(V, bool), token_bytes=[bytes([65 + i]) for i in range(V)])


HOT = SamplingParams(seed=1, temperature=1.5)
PENALISED = tuple(
    sampling._replace(presence_penalty=0.4, frequency_penalty=0.6, penalty_decay=0.9)
    for sampling in (SamplingParams(), HOT, HOT._replace(min_p=0.05))
)


def requests_of(num_members, num_problems, max_new_tokens=12):
    """Make prompts of 1 to 11 tokens, and completions of 4 to max_new_tokens tokens."""
    prompts = [tuple(random_tokens(1, 1 + 5 * p % 11, V, seed=p)[0].tolist()) for p in range(num_problems)]
    return [
        Request(member, p, prompt, 4 + (3 * member + 5 * p) % (max_new_tokens - 3))
        for member in range(num_members)
        for p, prompt in enumerate(prompts)
    ]
