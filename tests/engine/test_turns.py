"""Requests that go on after a reply: their states wait outside of the slots and come back into any."""

import pytest
from models import make_model
from rollouts import HOT, NEVER, V, requests_of

from rwkv_es.engine import rollout as loop
from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.memory import most_under_way
from rwkv_es.engine.rollout import rollout
from rwkv_es.engine.scheduler import Request, Scheduler, with_shared_prefixes
from rwkv_es.model.forward import draw_factors
from rwkv_es.model.sampler import SamplingParams
from rwkv_es.noise.factors import Noise, select

TURNS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), n_vocab=V)


@pytest.fixture(scope="module")
def factors(model):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.params.items()}
    noise = Noise(0, select(shapes, {"matrices": 1.0, "head.weight": 3.0}, 1)).at(0, 0.05)
    return draw_factors(noise, model, range(4))


def reply_to(tokens):
    """Of any length from 0 to 30, longer than all prompts."""
    return tuple((7 * tokens[0] + i) % V for i in range(sum(tokens) % 31))


class Partner:
    """Replies after some ticks, in an order of its own, to all answers but the last; counts who waits."""

    def __init__(self, requests, delay=0):
        self.requests, self.delay = requests, delay
        self.turns, self.sampled, self.most_waiting = [1] * len(requests), [0] * len(requests), 0
        self.waiting = []  # (ticks left, place, next request)

    def answered(self, ended):
        going_on = set()
        for place, completion in ended.items():
            self.sampled[place] += len(completion.tokens)
            if self.turns[place] < TURNS:
                self.turns[place] += 1
                going_on.add(place)
                prompt = (completion.tokens[-1], *reply_to(completion.tokens))
                request = self.requests[place]._replace(prompt=prompt, position=self.sampled[place], shared_prefixes=())
                is_over = place % 5 == 4 and self.turns[place] == 3  # its third answer is never asked for
                self.waiting.append([self.delay * (place % 3), place, None if is_over else request])
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        return going_on

    def replies(self, wait):
        found = {place: request for left, place, request in reversed(self.waiting) if left <= 0}
        self.waiting = [[left - 1, place, request] for left, place, request in self.waiting if left > 0]
        return found


def in_one_piece(model, request, place, decoding, factors):
    """Generate each answer of an episode from a prompt that holds everything before it."""
    text, tokens, found = request.prompt, [], []
    for _ in range(2 if place % 5 == 4 else TURNS):
        alone = request._replace(prompt=text, position=len(tokens), shared_prefixes=())
        found = rollout(model, [alone], decoding, factors).completions[0].tokens
        tokens += found
        text = (*text, *found, *reply_to(found))
    return tokens


@pytest.mark.bits
@pytest.mark.parametrize("engine", ["numba", "torch"])
@pytest.mark.parametrize("sampling", [SamplingParams(), HOT])
def test_an_episode_has_the_tokens_of_its_whole_history_read_again(model, factors, sampling, engine):
    requests = requests_of(4, 3)
    decoding = GenerationConfig(NEVER, sampling, 8, engine)
    expected = [in_one_piece(model, request, i, decoding, factors) for i, request in enumerate(requests)]
    for slots, delay in ((1, 0), (3, 2), (8, 5), (64, 1)):
        found = rollout(model, requests, decoding._replace(slots=slots), factors, partner=Partner(requests, delay))
        assert [completion.tokens for completion in found.completions] == expected, (slots, delay)


def test_history_is_not_read_again(model):
    requests = [request._replace(member=-1) for request in requests_of(1, 6)]
    partner = Partner(requests, 1)
    found = rollout(model, requests, GenerationConfig(NEVER, HOT, 4), partner=partner)
    expected = 0
    for place, (request, completion) in enumerate(zip(requests, found.completions)):
        answers = [
            completion.tokens[i : i + request.max_new_tokens]
            for i in range(0, len(completion.tokens), request.max_new_tokens)
        ]
        replies = [reply_to(answer) for answer in answers[: 2 if place % 5 == 4 else TURNS][:-1]]
        expected += len(request.prompt) + len(completion.tokens) - 1 + sum(map(len, replies))
    assert found.num_read == expected


def test_prompts_that_are_shared_are_still_read_once(model):
    requests = with_shared_prefixes([Request(-1, 0, tuple(range(20)), 4, sample) for sample in range(6)])
    alone = rollout(model, requests, GenerationConfig(NEVER, HOT, 4), partner=Partner(requests)).num_read
    assert (
        alone
        < rollout(
            model,
            [r._replace(shared_prefixes=()) for r in requests],
            GenerationConfig(NEVER, HOT, 4),
            partner=Partner(requests),
        ).num_read
        - 5 * 19
        + 1
    )


def test_what_waits_is_bounded_and_a_slow_partner_leaves_the_slots_to_others(model):
    requests = [request._replace(member=-1) for request in requests_of(1, 60)]
    partner = Partner(requests, 40)
    rollout(model, requests, GenerationConfig(NEVER, HOT, 8), partner=partner)
    assert 8 < partner.most_waiting <= most_under_way(8) == 16


def test_episodes_that_wait_leave_their_slots_and_are_no_more_than_twice_the_slots():
    scheduler = Scheduler([Request(-1, i, (1,), 1, id=i) for i in range(9)], 2)
    for first in (0, 2):
        assert [admission.request.id for admission in scheduler.schedule()] == [first, first + 1]
        scheduler.finish([0, 1], {first, first + 1})
        assert scheduler.close() == [] and not scheduler.active
    assert scheduler.schedule() == [] and scheduler.num_ready == 0 and not scheduler.is_done
    assert scheduler.resume(2, None) and not scheduler.resume(3, Request(-1, 3, (5,), 1))
    assert [admission.request.id for admission in scheduler.schedule()] == [3, 4], "who goes on comes first"


def test_a_gpu_loop_refuses_episodes(model, monkeypatch):
    from contextlib import contextmanager

    class GpuEngine:
        pass

    @contextmanager
    def engine_of(*_):
        yield GpuEngine()

    monkeypatch.setattr(loop, "engine_of", engine_of)
    monkeypatch.setattr(loop.gpu, "GpuEngine", GpuEngine)
    requests = requests_of(1, 1)
    with pytest.raises(loop.ConfigError, match="--engine torch"):
        rollout(model, requests, GenerationConfig(NEVER), partner=Partner(requests))
