"""Log probabilities of given texts, against float64 numpy."""

import numpy as np
import pytest
import reference
import torch
from models import make_model, random_tokens
from perturbed import noise_of
from rollouts import NEVER

from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.likelihood import Text, log_likelihoods, predict, score
from rwkv_es.model.forward import draw_factors, with_initial_state

V = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), n_vocab=V)


@pytest.fixture(scope="module")
def texts():
    ids = [tuple(random_tokens(1, length, V, seed=length)[0].tolist()) for length in (9, 2, 14, 5, 1, 7)]
    return [Text(text, start) for text, start in zip(ids, (1, 1, 6, 4, 1, 7))]


def expected(model, text):
    """Return the log probability of each token from `start` on, and whether it is the likeliest."""
    states = [tensor for name, tensor in model.params.items() if "time_state" in name] or None
    scores = reference.logits(model.params, list(text.ids), states)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    places = range(text.start, len(text.ids))
    return [(scores[i - 1, text.ids[i]], scores[i - 1].argmax() == text.ids[i]) for i in places]


def formed(model, noise, member):
    """Return the weights of a member, W + s * multiplier * sigma / sqrt(r) * A B^T, formed in full."""
    params = dict(model.params)
    for name, target in noise.targets.items():
        a, b = (factor[0].double() for factor in noise.factors(name, torch.tensor([member // 2])))
        size = (1 - 2 * (member % 2)) * target.multiplier * 0.05 / target.rank**0.5
        params[name] = params[name].double() + size * (a @ b.mT)
    return params


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("slots", [2, 256])
def test_scores_are_sums_of_float64_log_probabilities(model, texts, engine, slots):
    found = score(model, texts, GenerationConfig(NEVER, slots=slots, engine=engine))
    for text, each in zip(texts, found, strict=True):
        tokens = expected(model, text)
        # 1e-4: fp32 forward against float64, summed over 13 tokens
        assert each.log_probability == pytest.approx(sum(value for value, _ in tokens), abs=1e-4)
        assert each.is_greedy == all(flag for _, flag in tokens)
    assert found[4] == (0.0, True) and found[5] == (0.0, True), "nothing to predict"


def test_the_likeliest_continuation_is_greedy(model):
    ids = [3, 5]
    for _ in range(4):
        ids.append(int(reference.logits(model.params, ids)[-1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % V]
    early = [3, 5, (ids[2] + 1) % V]  # the first token is not the likeliest one, the second is
    early.append(int(reference.logits(model.params, early)[-1].argmax()))
    found = score(model, [Text(ids, 2), Text(other, 2), Text(early, 2), Text(early, 3)], GenerationConfig(NEVER))
    assert [each.is_greedy for each in found] == [True, False, False, True]


def test_every_token_comes_once_and_models_are_read_side_by_side(model, texts):
    other = model._replace(params={**model.params, "head.weight": model.params["head.weight"] * 2})
    seen = []
    for tick in predict([model, other], texts, GenerationConfig(NEVER, slots=4)):
        seen += list(zip(tick.texts.tolist(), tick.targets.tolist()))
        np.testing.assert_allclose(tick.logits[1], tick.logits[0] * 2, rtol=1e-5, atol=1e-5)
    wanted = [(i, token) for i, text in enumerate(texts) for token in text.ids[text.start :]]
    assert sorted(seen) == sorted(wanted)


@pytest.mark.bits
@pytest.mark.parametrize("targets", [{"matrices": 1.0, "head.weight": 3.0}, {"state": 10.0}])
def test_members_read_under_their_own_noise_with_the_same_bits_in_any_company(model, texts, targets):
    """Each member against the reference with its perturbed weights formed; then in other slots, orders and numbers."""
    model = with_initial_state(model) if "state" in targets else model
    noise = noise_of(model, targets, 1)
    factors = draw_factors(noise, model, range(1, 4))
    asked = [text._replace(member=member) for text in texts[:4] for member in range(2, 8)]
    found = dict(zip(asked, log_likelihoods(model, asked, GenerationConfig(NEVER, slots=64), factors).tolist()))
    for text, value in found.items():
        tokens = expected(model._replace(params=formed(model, noise, text.member)), text)
        assert value == pytest.approx(sum(each for each, _ in tokens), abs=2e-4)  # fp32 against fp64
    for seed, slots in enumerate((1, 3, 8, 24)):
        order = np.random.default_rng(seed).permutation(len(asked))[: 24 - seed]
        again = log_likelihoods(model, [asked[i] for i in order], GenerationConfig(NEVER, slots=slots), factors)
        assert again.tolist() == [found[asked[i]] for i in order]


def test_a_text_whose_logits_are_not_finite_has_no_likelihood(model):
    broken = {**model.params, "emb.weight": model.params["emb.weight"].clone()}
    broken["emb.weight"][7] = np.nan
    texts = [Text((1, 2, 3)), Text((1, 7, 3)), Text((1, 3, 7))]  # what follows the last one is not asked
    found = log_likelihoods(model._replace(params=broken), texts, GenerationConfig(NEVER), None)
    assert np.isfinite(found).tolist() == [True, False, True]
