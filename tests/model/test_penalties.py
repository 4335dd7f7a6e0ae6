"""Penalties and min_p, against the rwkv package's own `PIPELINE` and its logic written out."""

import math

import pytest
import reference
import torch
from models import make_model
from rollouts import HOT, NEVER, PENALISED, V, requests_of

from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.rollout import rollout
from rwkv_es.model.penalties import Penalties, counted
from rwkv_es.model.sampler import SamplingParams, sample

WORDS = [b"", b" ", b"7", b"12", b"0", b"a", b" a", b"\n", b"b", b"78", b"\t", b"the"]


class Tokens:
    """A vocabulary for PIPELINE: token i is WORDS[i]."""

    def encode(self, text):
        return [5] if text else []

    def decode(self, ids):
        return b"".join(WORDS[i] for i in ids).decode()


class Scripted:
    """A model whose logits depend on the last token and on how many it has read; it hands out copies."""

    def __init__(self):
        table = torch.randn(40, len(WORDS), len(WORDS), generator=torch.Generator().manual_seed(3))
        self.table = 0.4 * table
        self.table[..., [0, 8]] = -9.0  # nothing is written often without a penalty

    def forward(self, tokens, state):
        count = (state or 0) + len(tokens)
        return self.table[count % 40, tokens[-1]].clone(), count


def pipeline(args, num_tokens):
    utils = pytest.importorskip("rwkv.utils")
    pipe = utils.PIPELINE.__new__(utils.PIPELINE)  # its constructor wants a file with a vocabulary
    pipe.model, pipe.tokenizer, written = Scripted(), Tokens(), []
    choose = pipe.sample_logits
    pipe.sample_logits = lambda *a, **k: written.append(choose(*a, **k)) or written[-1]
    pipe.generate("x", num_tokens, utils.PIPELINE_ARGS(**args))
    return written


@pytest.mark.parametrize(("presence", "frequency", "decay"), [(0.3, 0.2, 0.996), (0.0, 1.0, 0.5), (2.0, 0.0, 1.0)])
def test_greedy_texts_are_those_of_the_rwkv_package(presence, frequency, decay):
    args = {"temperature": 0, "alpha_presence": presence, "alpha_frequency": frequency, "alpha_decay": decay}
    expected = pipeline(args, 120)
    assert expected != pipeline({**args, "alpha_presence": 0, "alpha_frequency": 0}, 120)
    sampling = SamplingParams(presence_penalty=presence, frequency_penalty=frequency, penalty_decay=decay)
    model, penalties = Scripted(), Penalties(sampling, counted(WORDS), 1, 120)
    row, written, token, state = torch.tensor([0]), [], 5, None
    for _ in range(120):
        scores, state = model.forward([token], state)
        penalties.penalise_(scores[None], row)
        token = int(sample(scores[None], sampling, torch.zeros(1, 4, dtype=torch.int64)))
        penalties.note_(row, torch.tensor([token]))
        written.append(token)
    assert written == expected


def occurrences(written, decay):
    """Return token -> occurrence after these tokens, as PIPELINE.generate keeps it."""
    found = {}
    for token in written:
        found = {other: count * decay for other, count in found.items()}
        found[token] = found.get(token, 0.0) + (0 if WORDS[token] in b" \t0123456789" else 1)
    return found


def test_rows_lose_what_they_have_written_themselves():
    sampling = SamplingParams(presence_penalty=0.4, frequency_penalty=0.7, penalty_decay=0.9)
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(len(WORDS), (6, 30), generator=generator)
    penalties = Penalties(sampling, counted(WORDS), 6, 30)
    for place in range(30):
        rows = torch.arange(6)[: 6 - place // 10]  # some stop earlier
        penalties.note_(rows, texts[rows, place])
    scores, lengths = torch.randn(6, len(WORDS), generator=generator), (30, 30, 30, 30, 20, 10)
    expected = scores.clone()
    for row, length in enumerate(lengths):
        for token, count in occurrences(texts[row, :length].tolist(), 0.9).items():
            expected[row, token] -= 0.4 + count * 0.7
    penalties.penalise_(scores, torch.arange(6))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)  # the penalty is rounded once, to fp32


def test_a_slot_that_is_taken_again_has_written_nothing():
    penalties = Penalties(PENALISED[0], counted(WORDS), 2, 4)
    penalties.note_(torch.tensor([0, 1]), torch.tensor([5, 6]))
    penalties.move(torch.tensor([0]), torch.tensor([1]))
    penalties.start_(1)
    scores = torch.zeros(2, len(WORDS))
    penalties.penalise_(scores, torch.arange(2))
    assert scores.nonzero().tolist() == [[0, 6]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), n_vocab=V)


def test_completions_follow_the_penalised_logits_of_float64_numpy(model):
    sampling = PENALISED[0]
    requests = [request._replace(member=-1) for request in requests_of(1, 5)]
    free = rollout(model, requests, GenerationConfig(NEVER, slots=3)).completions
    result = rollout(model, requests, GenerationConfig(NEVER, sampling, slots=3)).completions
    assert result != free
    for request, completion in zip(requests, result):
        counts = {}
        for place, token in enumerate(completion.tokens):
            scores = reference.logits(model.params, [*request.prompt, *completion.tokens[:place]])[-1].copy()
            for other, count in counts.items():
                scores[other] -= sampling.presence_penalty + count * sampling.frequency_penalty
            assert scores[token] >= scores.max() - 1e-4  # fp32 against fp64
            counts = {other: count * sampling.penalty_decay for other, count in counts.items()}
            counts[token] = counts.get(token, 0) + 1  # no token of NEVER is a blank or a digit


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest():
    logits = torch.tensor([0.5, 0.3, 0.12, 0.08]).log()
    counter = torch.zeros(20_000, 4, dtype=torch.int64)
    counter[:, 0] = torch.arange(20_000)
    for min_p, kept in ((0.15, 4), (0.23, 3), (0.59, 2), (0.61, 1), (1.0, 1)):
        tokens = sample(logits.expand(20_000, -1), SamplingParams(temperature=1.0, min_p=min_p), counter)
        found = torch.bincount(tokens, minlength=4).double() / 20_000
        expected = torch.tensor([0.5, 0.3, 0.12, 0.08]).double()
        expected[kept:] = 0
        assert (found - expected / expected.sum()).abs().max() < 4 * math.sqrt(0.25 / 20_000)


def test_a_sampled_token_follows_the_penalised_distribution():
    """20,000 rows with one history, each with its own luck, against softmax of PIPELINE's logits."""
    sampling = HOT._replace(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.5, penalty_decay=0.8)
    written, rows = [5, 6, 5, 2, 5], torch.arange(20_000)
    penalties = Penalties(sampling, counted(WORDS), len(rows), len(written) + 1)
    for token in written:
        penalties.note_(rows, torch.full((len(rows),), token))
    logits = torch.linspace(-1, 1, len(WORDS))
    expected = logits.double().clone()
    for token, count in occurrences(written, 0.8).items():
        expected[token] -= 0.5 + 0.5 * count
    scores, counter = logits.repeat(len(rows), 1), torch.zeros(len(rows), 4, dtype=torch.int64)
    counter[:, 0] = rows
    penalties.penalise_(scores, rows)
    found = torch.bincount(sample(scores, sampling, counter), minlength=len(WORDS)).double() / len(rows)
    assert (found - torch.softmax(expected, -1)).abs().max() < 4 * math.sqrt(0.25 / 20_000)
