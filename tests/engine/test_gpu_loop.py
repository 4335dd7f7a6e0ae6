"""The token loop of a GPU; without one, its kernels run in Triton's interpreter."""

import gc
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from interpreted import (  # noqa: F401
    DEVICE,
    HAS_GPU,
    capture_that_keeps_nothing,
    in_the_interpreter,
    loop_kernels,
    on_device,
)
from models import make_model, random_tokens
from perturbed import noise_of
from rollouts import HOT, NEVER, PENALISED, V, requests_of

from rwkv_es.engine import gpu_loop
from rwkv_es.engine.decoding import Completion, GenerationConfig
from rwkv_es.engine.likelihood import Text, log_likelihoods
from rwkv_es.engine.rollout import rollout
from rwkv_es.engine.scheduler import Request, with_shared_prefixes
from rwkv_es.gpu import engine as gpu
from rwkv_es.gpu import slots as gpu_slots
from rwkv_es.gpu.slots import GpuSlots, Sizes
from rwkv_es.model import forward as torch_engine
from rwkv_es.model.forward import State, draw_factors
from rwkv_es.model.sampler import SamplingParams, sample
from rwkv_es.noise.factors import hash_key


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), n_embd=64, n_vocab=V)


@pytest.fixture(scope="module")
def factors(model):
    return draw_factors(noise_of(model, {"matrices": 1.0, "head.weight": 3.0}, 1), model, range(4))


class PlainEngine:
    """Plain torch operations in a tick: the arithmetic of the reference, so that every token must be the same."""

    def __init__(self, model, num_rows, capture=None):
        self.model, self.capture = model, capture
        self.live = torch.zeros(num_rows, dtype=torch.int32, device=model.like.device)

    def read_(self, weights, tokens, state):
        return torch_engine.forward(weights, self.model.arch, tokens, state)

    def read_texts_(self, weights, reading, state):
        """One token after the other, in a multiple of 8 rows."""
        slot, count = reading.texts
        for t in range(len(reading.tokens) // len(slot)):
            if len(rows := torch.arange(len(slot))[count > t]) == 0:
                break
            whole = torch.from_numpy(np.resize(rows.numpy(), -(-len(rows) // 8) * 8))
            at = whole * (len(reading.tokens) // len(slot)) + t
            copied = State(*(part[:, slot[whole]] for part in state))
            torch_engine.forward(weights.rows(at), self.model.arch, reading.tokens[at], copied)
            for part, renewed in zip(state, copied):
                part[:, slot[rows]] = renewed[:, : len(rows)]

    def logits(self, weights, x):
        return torch_engine.logits(weights, x)


def generated(model, requests, decoding, factors, heard=None):
    numbered = [request._replace(id=i) for i, request in enumerate(requests)]
    engine = PlainEngine(model, decoding.padded(min(decoding.slots, len(requests))))
    return gpu_loop.rollout(engine, numbered, decoding, factors, heard or (lambda ended: None))


@pytest.mark.parametrize(
    ("slots", "sampling"),
    [(3, SamplingParams()), (16, HOT), (5, HOT), (16, HOT._replace(top_p=0.9)), (3, HOT._replace(top_k=3, top_p=0.8))]
    + [(slots, sampling) for sampling in PENALISED for slots in (3, 16)],
)
def test_the_same_tokens_as_the_token_loop_of_a_cpu(model, factors, sampling, slots):
    requests, parts = requests_of(8, 2, 6), []
    decoding = GenerationConfig(NEVER, sampling, slots, "torch")
    expected = rollout(model, requests, decoding, factors)
    found = generated(model, requests, decoding, factors, parts.append)
    assert found.completions == expected.completions
    assert found.num_read == expected.num_read
    told = {i: completion for part in parts for i, completion in part.items()}
    assert [told[i] for i in range(len(requests))] == expected.completions
    assert sum(map(len, parts)) == len(requests)


@pytest.mark.parametrize("slots", [3, 64])
def test_shared_prefixes_change_nothing(model, factors, slots):
    header = tuple(random_tokens(1, 20, V, seed=9)[0].tolist())
    plain = [r._replace(prompt=header + r.prompt, sample=k) for r in requests_of(2, 2, 4) for k in range(2)]
    requests, decoding = with_shared_prefixes(plain), GenerationConfig(NEVER, HOT, slots, "torch")
    expected = rollout(model, plain, decoding, factors)
    found = generated(model, requests, decoding, factors)
    assert found.completions == expected.completions
    assert found.num_read < 0.7 * expected.num_read


def test_rows_end_where_they_end_on_a_cpu(model, factors):
    """At the end token, at a stop string over two tokens, at the length; each request has stops of its own."""
    requests = requests_of(4, 3, 12)
    free = rollout(model, requests, GenerationConfig(NEVER, HOT, engine="torch"), factors).completions
    pair = b"".join(NEVER.token_bytes[token] for token in free[0].tokens[1:3])
    can_end = np.array([data == pair[-1:] for data in NEVER.token_bytes])
    stops = NEVER._replace(end_id=free[1].tokens[2], strings=(pair,), can_end=can_end)
    single = stops._replace(strings=(pair[-1:],))
    requests = [r._replace(stops=(None, single)[r.problem % 2]) for r in requests]
    decoding = GenerationConfig(stops, HOT, 5, "torch")
    expected = rollout(model, requests, decoding, factors)
    found = generated(model, requests, decoding, factors)
    assert found.completions == expected.completions
    assert found.num_read == expected.num_read
    assert len({c.finish for c in expected.completions}) == 2


def test_a_row_whose_logits_are_not_finite_is_broken(model, factors):
    weird = {**model.params, "emb.weight": model.params["emb.weight"].clone()}
    weird["emb.weight"][7] = torch.nan
    requests = [Request(0, p, (7,) if p % 3 == 0 else (1, 2, 3 + p), 5) for p in range(9)]
    for sampling in (SamplingParams(), HOT, HOT._replace(top_k=2)):
        decoding = GenerationConfig(NEVER, sampling, 4, "torch")
        broken = model._replace(params=weird)
        expected = rollout(broken, requests, decoding, factors)
        found = generated(broken, requests, decoding, factors)
        assert found.completions == expected.completions
        assert found.num_read == expected.num_read
    assert [c.finish == "broken" for c in found.completions][:4] == [True, False, False, True]


def test_an_initial_state_is_where_texts_start(model):
    states = {f"blocks.{i}.att.time_state": torch.randn(1, 64, 64) for i in range(2)}
    tuned = model._replace(params={**model.params, **states})
    requests = [Request(-1, p, (p, 2), 6) for p in range(12)]
    decoding = GenerationConfig(NEVER, HOT, 4, "torch")
    expected = rollout(tuned, requests, decoding).completions
    assert generated(tuned, requests, decoding, None).completions == expected
    assert expected != rollout(model, requests, decoding).completions


def test_as_graphs_on_the_kernels_of_a_gpu(tmp_path, monkeypatch):
    """Ticks over several numbers of rows, captured before anybody is there, in memory that nothing else keeps alive."""
    small = on_device(make_model(tmp_path, 1, 64, V))
    monkeypatch.setattr(gpu_slots, "_FEWEST", 8)
    prompts = [(p, *range(2, 21))[: (1, 2, 20)[p % 3]] for p in range(10)]
    requests = [Request(-1, p, prompt, 5 if p == 3 else 2, id=p) for p, prompt in enumerate(prompts)]
    decoding = GenerationConfig(NEVER, HOT, 16, "triton")
    expected = rollout(small, requests, GenerationConfig(NEVER, HOT, 16, "torch"))
    captured = []
    with gpu.running(small, None, 16) as engine:
        if not HAS_GPU:
            engine.capture = lambda run: captured.append(run.func.__name__) or capture_that_keeps_nothing(run)
        found = gpu_loop.rollout(engine, requests, decoding, None, lambda ended: gc.collect())
    assert HAS_GPU or captured == ["_tick", "_tick", "_read"]
    assert found.completions == expected.completions


@dataclass
class Script:
    """A device whose rows write what is scripted for their request, until they are told to rest."""

    texts: list  # by request: tokens
    end_id: int
    slots: list = field(default_factory=list)
    states: dict = field(default_factory=dict)
    ticks: list = field(default_factory=list)
    num_late: int = 0  # tokens that were written after a stop that the device does not know

    def tick(self, count):
        heard = np.full(count, -1, np.int32)
        for s in range(count):
            row = self.slots[s]
            if row is not None and row["live"]:
                request = row["request"]
                row["read"] += ((*request.prompt, *self.texts[request.id])[len(row["read"])],)
                n = len(row["read"]) - len(request.prompt)
                if n >= 0:
                    heard[s] = self.texts[request.id][n]
                    row["live"] = heard[s] != self.end_id and n + 1 < request.max_new_tokens
        self.ticks.append(heard)
        return len(self.ticks) - 1

    def read(self, parts):
        for place, count, lives in parts:
            row = self.slots[place]
            assert not row["live"] and 0 < count <= gpu_slots.AT_ONCE
            row["read"] += row["request"].prompt[len(row["read"]) :][:count]
            row["live"] = lives
            assert lives == (len(row["read"]) == len(row["request"].prompt) - 1)

    def listen(self, tick, count):
        assert tick == len(self.ticks) - 1 - gpu_loop.AHEAD, "heard as late as it may be"
        return self.ticks[tick][:count]

    def admit(self, entries, stopped):
        for place in stopped:
            self.slots[place]["live"] = False
        for place, request, num_read, saved in entries:
            read = self.states[saved] if saved >= 0 else ()
            assert len(read) == num_read and read == request.prompt[:num_read]
            is_read = num_read == len(request.prompt) - 1
            self.slots[place] = {"request": request, "read": tuple(read), "live": is_read}

    def save(self, places):
        for slot, saved in places:
            self.states[saved] = self.slots[slot]["read"]

    def move(self, places):
        for start, end in places:
            assert self.slots[end] is None or not self.slots[end]["live"]
            self.slots[end], self.slots[start] = self.slots[start], None


def scripted(seed):
    """Requests with random prompts, samples and texts; a stop string of two tokens, an end token."""
    rng = np.random.default_rng(seed)
    requests, texts = [], []
    for member in range(int(rng.integers(1, 7))):
        header = tuple(rng.integers(2, V, 9).tolist())
        for p in range(int(rng.integers(1, 5))):
            prompt = header + tuple(rng.integers(2, V, rng.integers(1, 12)).tolist())
            requests += [
                Request(member, p, prompt, int(rng.integers(1, 15)), k) for k in range(int(rng.integers(1, 4)))
            ]
    texts = [rng.integers(0, 9, 15).tolist() for _ in requests]
    return requests, texts


@pytest.mark.parametrize("seed", range(12))
def test_what_is_written_after_a_stop_goes_nowhere(seed, monkeypatch):
    monkeypatch.setattr(gpu_slots, "_FEWEST", 8)
    plain, texts = scripted(seed)
    requests = [r._replace(id=i) for i, r in enumerate(with_shared_prefixes(plain) if seed % 2 else plain)]
    string, end_id = NEVER.token_bytes[3] + NEVER.token_bytes[4], 0
    can_end = np.array([data == string[-1:] for data in NEVER.token_bytes])
    stops = NEVER._replace(end_id=end_id, strings=(string,), can_end=can_end)
    num_slots = (3, 8, 21, 64)[seed % 4]
    slots = -(-min(num_slots, len(requests)) // 8) * 8
    device = Script(texts, end_id, slots=[None] * slots)
    loop = gpu_loop.Loop(device, requests, GenerationConfig(stops, slots=num_slots), gpu_loop.counts_of(slots, 8))
    found, expected, num_read = loop.run(lambda ended: None), [], 0
    for request, text in zip(requests, texts):
        ends = [
            n + 1 for n in range(request.max_new_tokens) if text[n] == end_id or text[max(n - 1, 0) : n + 1] == [3, 4]
        ]
        length = min([*ends, request.max_new_tokens])
        expected.append(Completion(text[:length], "stop" if ends else "length"))
        num_read += len(request.prompt) + length - 1
    assert found.completions == expected
    assert found.num_read == num_read if not seed % 2 else found.num_read <= num_read
    assert found.num_ticks <= num_read / num_slots + 80
    assert not loop.under_way or len(loop.under_way) == gpu_loop.AHEAD
    assert not loop.saved and not loop.scheduler.active


def test_prompts_are_read_in_parts_and_the_rows_that_read_them_wait_for_company():
    """16 tokens at a time, up to the last one; what may be read at once does not depend on the company."""

    def ticks_of(lengths, slots):
        requests = [Request(p, p, (5,) * n, 3, id=p) for p, n in enumerate(lengths)]
        device = Script([[1, 1, 1]] * len(lengths), 0, slots=[None] * slots)
        loop = gpu_loop.Loop(
            device, requests, GenerationConfig(NEVER, slots=len(lengths)), gpu_loop.counts_of(slots, 8)
        )
        assert all(c.tokens == [1, 1, 1] for c in loop.run(lambda ended: None).completions)
        return loop.num_ticks - len(device.ticks), len(device.ticks)

    written = 3 + gpu_loop.AHEAD
    assert ticks_of([161], 16) == (10, written)
    assert ticks_of([1], 16) == (0, written)
    assert ticks_of([34] * 64, 64) == (3 * 16, written), "parts of 16, 16 and 1 tokens, in 4 rows at a time"
    assert ticks_of([40, *[1] * 15], 16)[0] == 3


class Crossings:
    """Counts the bytes that the package lets go between host and device, and refuses all other ways to do so."""

    def __init__(self, monkeypatch):
        self.up = self.down = 0
        self.watch(monkeypatch, torch, "from_numpy", lambda array: self.add(up=array.nbytes))
        self.watch(monkeypatch, torch.Tensor, "numpy", lambda tensor: self.add(down=tensor.nbytes))
        for name in ("tolist", "item", "cpu", "__int__", "__float__", "__bool__", "__index__", "__array__"):
            self.watch(monkeypatch, torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} crosses"))
        for name in ("tensor", "as_tensor"):
            self.watch(monkeypatch, torch, name, lambda *_, name=name: pytest.fail(f"{name} crosses"))

    def add(self, up=0, down=0):
        self.up, self.down = self.up + up, self.down + down

    def watch(self, monkeypatch, owner, name, note):
        real = getattr(owner, name)

        def call(*args, **options):
            if sys._getframe(1).f_globals["__name__"].startswith("rwkv_es."):
                note(*args)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)


def test_nothing_crosses_between_host_and_device_but_tokens_and_requests(model, factors, monkeypatch):
    """While texts are generated, in bytes: four a slot and tick come back; an entry for each request goes there."""
    header = tuple(random_tokens(1, 20, V, seed=9)[0].tolist())
    requests = with_shared_prefixes([r._replace(prompt=header + r.prompt) for r in requests_of(8, 2, 6)])
    sent, run, found = [], gpu_loop.Loop.run, {}

    def counted(loop, on_finished):
        real = loop.device._sent
        monkeypatch.setattr(loop.device, "_sent", lambda values: sent.append(values.nbytes) or real(values))
        with monkeypatch.context() as patch:
            found["crossings"], found["loop"] = Crossings(patch), loop
            return run(loop, on_finished)

    monkeypatch.setattr(gpu_loop.Loop, "run", counted)
    monkeypatch.setattr(gpu_slots, "_FEWEST", 8)
    generated(model, requests, GenerationConfig(NEVER, HOT, 8, "torch"), factors)
    crossings, device = found["crossings"], found["loop"].device
    num_heard = device.num_ticks - len(found["loop"].under_way)
    assert crossings.down == 4 * 8 * num_heard, "a token of each of 8 slots"
    entry = 4 * (loop_kernels.NUM_COLUMNS + max(len(r.prompt) for r in requests))
    num_readings = found["loop"].num_ticks - device.num_ticks
    pairs = 16 * (len(requests) + 8)  # where a state is copied from and to: of each request, and of each header
    assert crossings.up == sum(sent) == len(requests) * entry + pairs + num_readings * 12
    assert crossings.up < 0.1 * len(requests) * device.state.wkv[:, 0].nbytes, "less than states would be"


def test_prompts_are_read_in_as_many_rows_as_ticks_have():
    assert gpu_loop.readers_of([64, 128, 256, 1024]) == [4, 8, 16, 64]
    assert gpu_loop.readers_of([8, 24, 40]) == [1, 3, 5] and gpu_loop.at_once([8, 24, 40]) == 8
    assert gpu_loop.readers_of([8, 24, 48]) == [3] and gpu_loop.at_once([8, 24, 48]) == 16


@pytest.mark.parametrize("temperature", [0.0, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("num_words", [7, 100, 5000])
def test_tokens_are_chosen_as_by_the_reference(temperature, num_words, monkeypatch):
    """The kernel sums exponentials of fp32 in fp64; both invert the distribution function at the same numbers."""
    monkeypatch.setattr(loop_kernels, "_WORDS", 2048)
    rows, generator = 24, torch.Generator().manual_seed(num_words)
    logits = 3 * torch.randn(rows, num_words + 9, generator=generator)
    logits[0, :] = 1.0  # all are equal
    logits[1, num_words // 2 : num_words // 2 + 2] = 50.0  # two are
    logits[:, num_words:] = 99.0  # may not be chosen
    logits[2, 1:] = -torch.inf
    sampling, request = SamplingParams(5, temperature), Request(3, 2**31 + 1, (1, 2), 9, sample=4, step=2**32 - 1)
    slots = loop_kernels.Slots(
        *(torch.ones(rows, dtype=torch.int32, device=DEVICE) for _ in range(3)),
        torch.full((rows,), 9, dtype=torch.int32, device=DEVICE),
        torch.zeros(rows, dtype=torch.int64, device=DEVICE),
        torch.zeros(rows, device=DEVICE),
        torch.tensor([request.counter] * rows, device=DEVICE),
        torch.zeros(rows, 4, dtype=torch.int32, device=DEVICE),
        torch.zeros(rows, 9, dtype=torch.int32, device=DEVICE),
    )
    slots.position.copy_(torch.arange(rows) % 6)  # in the prompt, then tokens 0 to 5
    slots.counter[:, 1] += torch.arange(rows, device=DEVICE)
    key = torch.tensor(hash_key("sampling", sampling.seed), device=DEVICE)
    heard, written = torch.full((rows,), 7, dtype=torch.int32, device=DEVICE), torch.arange(rows) % 6
    counter = slots.counter.clone()
    counter[:, 0] += written.to(DEVICE)
    expected = sample(logits[:, :num_words].to(DEVICE), sampling, counter)
    loop_kernels.write_tokens(heard, slots, loop_kernels.Choice(logits.to(DEVICE), key, num_words, temperature, -1))
    assert heard.tolist() == expected.tolist()
    assert slots.written[torch.arange(rows), written].tolist() == expected.tolist()
    assert slots.live.tolist() == [1] * rows and slots.position.tolist() == (written + 1).tolist()


def test_ticks_are_made_for_few_numbers_of_rows():
    assert gpu_loop.counts_of(1024, 8) == [64, 128, 256, 384, 512, 768, 1024]
    assert gpu_loop.counts_of(40, 8) == [8, 16, 24, 32, 40]
    assert gpu_loop.counts_of(8, 8) == [8]
    assert gpu_loop.counts_of(0, 8) == []


def test_trying_a_tick_with_nobody_there_changes_nothing(tmp_path):
    """Graphs are prepared so."""
    small = on_device(make_model(tmp_path, 1, 64, V))
    with gpu.running(small, None, 8) as engine:
        slots = GpuSlots(engine, None, Sizes(8, 4, 4, 8, 0, 2, V), GenerationConfig(NEVER, HOT))
        slots.state.wkv.fill_(3.0)
        before = [column.clone() for column in (*slots.slots, *slots.state)]
        slots.prepare([8], [1])
        slots.readers[1][0]()
        assert (slots.listen(slots.tick(8), 8) == loop_kernels.NOTHING).all()
    assert all(torch.equal(one, other) for one, other in zip(before, (*slots.slots, *slots.state)))


def test_members_read_reference_answers_on_the_kernels_of_a_gpu(tmp_path):
    small = on_device(make_model(tmp_path, 1, 64, V))
    noise = draw_factors(noise_of(small, {"matrices": 1.0, "head.weight": 3.0}, 1), small, range(1, 4))
    texts = [Text(tuple(random_tokens(1, n, V, seed=n)[0].tolist()), 1, m) for n in (5, 3) for m in range(2, 8)]
    expected, found = (
        log_likelihoods(small, texts, GenerationConfig(NEVER, slots=8, engine=engine), noise)
        for engine in ("torch", "triton")
    )
    assert len(set(expected)) == len(texts)
    np.testing.assert_allclose(found, expected, atol=1e-4)  # sums of fp32 in another order
