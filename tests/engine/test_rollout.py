import numpy as np
import pytest
import reference
from models import make_model, random_tokens
from rollouts import HOT, NEVER, PENALISED, V, requests_of

from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.rollout import rollout
from rwkv_es.engine.scheduler import Request, with_shared_prefixes
from rwkv_es.model.forward import draw_factors
from rwkv_es.model.sampler import SamplingParams
from rwkv_es.noise.factors import Noise, select
from rwkv_es.system.errors import ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), n_vocab=V)


@pytest.fixture(scope="module")
def factors(model):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.params.items()}
    noise = Noise(0, select(shapes, {"matrices": 1.0, "head.weight": 3.0}, 1)).at(0, 0.05)
    return draw_factors(noise, model, range(4))


def test_greedy_completions_equal_float64_numpy(model):
    """Through slots that are refilled: 3 slots serve 6 requests."""
    requests = [request._replace(member=-1) for request in requests_of(1, 6)]
    result = rollout(model, requests, GenerationConfig(NEVER, slots=3))
    for request, completion in zip(requests, result.completions):
        text = list(request.prompt)
        for token in completion.tokens:
            scores = reference.logits(model.params, text)[-1]
            assert scores[token] >= scores.max() - 1e-4
            text.append(token)
        assert len(completion.tokens) == request.max_new_tokens and completion.finish == "length"


@pytest.mark.bits
@pytest.mark.parametrize("sampling", [SamplingParams(), HOT, *PENALISED])
def test_the_same_request_has_the_same_tokens_in_any_slot_order_and_company(model, factors, sampling):
    requests = requests_of(8, 6)
    expected = dict(zip(requests, rollout(model, requests, GenerationConfig(NEVER, sampling, 64), factors).completions))
    assert len({tuple(c.tokens) for c in expected.values()}) > 20, "the rows must differ for this to mean anything"
    for seed, slots in enumerate((1, 3, 8, 17, 48)):
        order = np.random.default_rng(seed).permutation(len(requests))[: 48 - seed]
        shuffled = [requests[i] for i in order]
        result = rollout(model, shuffled, GenerationConfig(NEVER, sampling, slots), factors)
        assert all(expected[r] == c for r, c in zip(shuffled, result.completions)), slots


def test_mirrored_members_share_their_luck_and_others_do_not(model):
    """Under no perturbation (all factors zero) mirrored members sample the same tokens."""
    requests = [Request(member, p, (1, 2), 10) for member in range(4) for p in range(2)]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.params.items()}
    silent = draw_factors(Noise(0, select(shapes, {"head.weight": 1e-30}, 1)).at(0, 1e-30), model, range(2))
    a0, a1, b0, b1, c0, c1, d0, d1 = (
        c.tokens for c in rollout(model, requests, GenerationConfig(NEVER, HOT), silent).completions
    )
    assert a0 == b0 and a1 == b1 and c0 == d0 and c1 == d1
    assert a0 != c0 and a0 != a1


@pytest.mark.bits
@pytest.mark.parametrize("slots", [4, 64])
def test_forked_states_change_nothing(model, factors, slots):
    header = tuple(random_tokens(1, 20, V, seed=9)[0].tolist())
    requests = [
        request._replace(prompt=header + request.prompt, sample=sample)
        for request in requests_of(4, 3)
        for sample in range(3)
    ]
    plain = rollout(model, requests, GenerationConfig(NEVER, HOT, slots), factors)
    forked = rollout(model, with_shared_prefixes(requests), GenerationConfig(NEVER, HOT, slots), factors)
    assert forked.completions == plain.completions
    assert forked.num_read < 0.7 * plain.num_read, "the header was read more than once per member"


@pytest.mark.bits
@pytest.mark.parametrize("engine", ["torch", "numba"])
@pytest.mark.parametrize("most_ahead", [8, 24, 256])
def test_prompts_read_many_tokens_at_once_change_nothing_but_the_ticks(model, factors, engine, most_ahead, monkeypatch):
    shared = tuple(random_tokens(1, 37, V)[0].tolist())
    prompts = [shared + tuple(random_tokens(1, length, V, seed=length)[0].tolist()) for length in (1, 2, 9, 30)]
    plain = [Request(m, p, prompt, 6, k) for m in range(4) for p, prompt in enumerate(prompts) for k in range(2)]
    requests, decoding = with_shared_prefixes(plain), GenerationConfig(NEVER, HOT, 8, engine)
    monkeypatch.setattr("rwkv_es.engine.rollout.FEW_ROWS", 0)
    expected = rollout(model, plain, decoding, factors)
    forked = rollout(model, requests, decoding, factors)
    monkeypatch.setattr("rwkv_es.engine.rollout.FEW_ROWS", 16)
    monkeypatch.setattr("rwkv_es.engine.rollout.MOST_AHEAD", most_ahead)
    found = rollout(model, requests, decoding, factors)
    assert found.completions == forked.completions == expected.completions
    assert found.num_read == forked.num_read < expected.num_read
    assert found.num_ticks < forked.num_ticks


def test_a_row_ends_at_the_end_token_or_at_a_stop_string(model):
    requests = [Request(-1, p, tuple(random_tokens(1, 4, V, seed=p)[0].tolist()), 40) for p in range(12)]
    free = [c.tokens for c in rollout(model, requests, GenerationConfig(NEVER, HOT)).completions]
    end = free[0][5]
    pair = NEVER.token_bytes[free[1][7]] + NEVER.token_bytes[free[1][8]]
    can_end = np.array([data == pair[-1:] for data in NEVER.token_bytes])
    stops = NEVER._replace(end_id=end, strings=(pair,), can_end=can_end)
    for tokens, completion in zip(free, rollout(model, requests, GenerationConfig(stops, HOT)).completions):
        text = b"".join(NEVER.token_bytes[token] for token in tokens)
        ends = [tokens.index(end) + 1] if end in tokens else []
        if pair in text:
            ends.append(text.index(pair) + 2)
        expected = tokens[: min(ends)] if ends else tokens
        assert completion.tokens == expected
        assert completion.finish == ("stop" if ends else "length")


def test_ids_beyond_the_vocabulary_are_never_sampled(model):
    stops = NEVER._replace(can_end=np.zeros(5, bool))
    result = rollout(model, requests_of(1, 6), GenerationConfig(stops, HOT._replace(temperature=50.0)))
    tokens = {token for completion in result.completions for token in completion.tokens}
    assert tokens == set(range(5))


def test_refilled_slots_are_never_idle_while_somebody_waits(model):
    requests = [Request(-1, p, (1,), 4 if p % 4 else 16) for p in range(32)]
    result = rollout(model, requests, GenerationConfig(NEVER, slots=8))
    total = sum(len(r.prompt) + r.max_new_tokens - 1 for r in requests)
    assert result.num_read == total
    assert result.num_ticks < total / 8 + 16  # lockstep batches of 8 would take 4 * 16 ticks


def test_a_long_prompt_that_comes_last_is_not_left_over_at_the_end(model, monkeypatch):
    monkeypatch.setattr("rwkv_es.engine.rollout.FEW_ROWS", 0)  # as with many rows
    requests = [Request(-1, p, (1,) * (8 if p % 16 < 15 else 24), 4) for p in range(32)]
    result = rollout(model, requests, GenerationConfig(NEVER, slots=8))
    assert result.num_ticks == 4 * 11 + 16, "the last one starts with the last eight but runs on for 16 more"
    plain = rollout(model, requests[::-1], GenerationConfig(NEVER, slots=8))
    assert result.completions == plain.completions[::-1]


def test_what_has_ended_is_told_at_once(model):
    requests = requests_of(1, 6)
    told = []
    result = rollout(model, requests, GenerationConfig(NEVER, HOT, slots=3), on_finished=told.append)
    assert len(told) == result.num_ticks
    assert {i: found for ended in told for i, found in ended.items()} == dict(enumerate(result.completions))
    ticks = {i: tick for tick, ended in enumerate(told) for i in ended}
    first = len(requests[0].prompt) + requests[0].max_new_tokens - 2
    assert ticks[0] == first < max(ticks.values()), "after its last token, while others go on"


def test_no_requests_are_no_work(model):
    assert rollout(model, [], GenerationConfig(NEVER)).completions == []


def test_each_request_stops_at_its_own_strings(model):
    requests = [Request(-1, p, tuple(random_tokens(1, 4, V, seed=p)[0].tolist()), 40) for p in range(12)]
    free = [c.tokens for c in rollout(model, requests, GenerationConfig(NEVER, HOT)).completions]
    ends = (free[0][5], free[1][5], None)  # each kind of request ends at a token of its own, or at none
    kinds = [None if end is None else stopping_at(end) for end in ends]
    mixed = [request._replace(stops=kinds[p % 3]) for p, request in enumerate(requests)]
    found = [c.tokens for c in rollout(model, mixed, GenerationConfig(NEVER, HOT, slots=5)).completions]
    for p, tokens in enumerate(free):
        length = tokens.index(ends[p % 3]) + 1 if ends[p % 3] in tokens else len(tokens)
        assert found[p] == tokens[:length]
    assert len(found[0]) < len(free[0]) and len(found[1]) < len(free[1]) and len(found[2]) == len(free[2])


def stopping_at(token):
    return NEVER._replace(strings=(NEVER.token_bytes[token],), can_end=np.arange(V) == token)


@pytest.mark.parametrize("engine", ["torch", "numba"])
@pytest.mark.parametrize(
    ("slots", "num_members"), [(64, 4), (5, 4), (12, 6)]
)  # fewer requests than slots; no multiple of 8
def test_padding_rows_get_a_direction_that_this_process_has(model, engine, slots, num_members):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.params.items()}
    noise = Noise(0, select(shapes, {"matrices": 1.0}, 1)).at(0, 0.05)
    whole, part = draw_factors(noise, model, range(20)), draw_factors(noise, model, range(16, 16 + num_members // 2))
    requests = [request._replace(member=32 + request.member) for request in requests_of(num_members, 3)]
    alone = rollout(model, requests, GenerationConfig(NEVER, HOT, slots, engine), part)
    assert alone.completions == rollout(model, requests, GenerationConfig(NEVER, HOT, slots, engine), whole).completions


def test_a_request_whose_factors_are_elsewhere_is_no_silent_mistake(model, factors):
    with pytest.raises(AssertionError, match="no factors of 8"):
        rollout(model, [Request(8, 0, (1, 2), 4)], GenerationConfig(NEVER), factors)  # directions 0 to 3 are there


@pytest.mark.parametrize("sampling", [SamplingParams(), HOT])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_their_own_row_and_are_named(model, sampling, value):
    requests = [Request(-1, p, (1, 2, 3 + p), 12) for p in range(9)]
    expected = rollout(model, requests, GenerationConfig(NEVER, sampling)).completions
    for place in (0, 4):  # poison what follows these tokens of one text
        poisoned = model.params["emb.weight"].clone()
        token = expected[place].tokens[3]
        poisoned[token] = value
        found = rollout(
            model._replace(params={**model.params, "emb.weight": poisoned}), requests, GenerationConfig(NEVER, sampling)
        )
        for request, before, after in zip(requests, expected, found.completions):
            read = [*request.prompt, *before.tokens[:-1]]
            if token in read:
                written = before.tokens[: max(0, read.index(token) + 1 - len(request.prompt))]
                assert after == (written, "broken"), "up to the token whose successor cannot be told"
            else:
                assert after == before
        assert found.completions[place].finish == "broken"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(-1, 0, (1,), 2**20 + 1), "at most 1048576 tokens; got a limit of 1048577"),
        (Request(-1, 0, (1,), 1, sample=4096), "at most 4096 samples of a member; got 4097"),
    ],
)
def test_more_tokens_or_samples_than_there_is_noise_for_are_refused(model, request_, words):
    with pytest.raises(ConfigError, match=words):
        rollout(model, [request_], GenerationConfig(NEVER))
    most = request_._replace(max_new_tokens=1, sample=min(request_.sample, 4095))
    assert len(rollout(model, [most], GenerationConfig(NEVER, HOT)).completions[0].tokens) == 1
