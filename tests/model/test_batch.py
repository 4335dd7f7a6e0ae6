"""The promise of equal bits: products that need more rows are found, what cannot be promised is said."""

import os
import subprocess
import sys
from functools import partial

import libraries
import pytest
import torch
from models import make_model
from places import ROOT
from rollouts import HOT, NEVER, V, requests_of
from torch.nn import functional

from rwkv_es import generate, load_model
from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.engines import examined
from rwkv_es.engine.rollout import rollout
from rwkv_es.model import batch, int8
from rwkv_es.model.batch import Verdict, advice, examine, padded
from rwkv_es.model.forward import Model, draw_factors
from rwkv_es.noise.factors import Noise, select
from rwkv_es.noise.lowrank import torch_threads


@pytest.fixture
def library(monkeypatch):
    return partial(libraries.install, monkeypatch)


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path, n_vocab=V)


@pytest.mark.bits
@pytest.mark.parametrize(
    ("is_odd", "multiple"),
    [
        (lambda rows: False, 8),
        (lambda rows: rows == 8, 16),  # MKL on CPUs with AVX-512
        (lambda rows: rows < 24, 32),
        (lambda rows: rows < 56, 64),  # MKL's AVX2 kernels
        (lambda rows: rows % 32 != 0, 32),
    ],
)
@pytest.mark.parametrize("engine", ["torch", "numba"])
def test_a_multiple_is_found_with_which_slots_change_no_token(model, library, is_odd, multiple, engine):
    library(is_odd)
    verdict = examine(model, 96, is_fused=engine == "numba")
    assert verdict == Verdict(multiple) and advice(verdict) == ""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.params.items()}
    noise = Noise(0, select(shapes, {"matrices": 1.0, "head.weight": 3.0}, 1)).at(0, 0.05)
    factors, requests = draw_factors(noise, model, range(2)), requests_of(4, 20)
    found = [
        rollout(model, requests, GenerationConfig(NEVER, HOT, slots, engine, 1, verdict.multiple), factors).completions
        for slots in (8, 24, 96)
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.bits
def test_where_no_multiple_helps_the_user_is_told(model, library):
    library(lambda rows: rows % 128 != 0)
    verdict = examine(model, 256)
    assert verdict.multiple == 8 and "head.weight" in verdict.by_rows
    text = advice(verdict)
    assert text.startswith("note: ") and "harmless" in text and "\n" not in text
    assert all(words in text for words in ("--slots", "--threads", "processes", "how many texts"))


@pytest.mark.bits
def test_only_the_numbers_of_rows_that_occur_are_asked_for(model, library):
    library(lambda rows: rows > 512)
    assert examine(model, 512).by_rows == () != examine(model, 1024).by_rows


@pytest.mark.bits
@pytest.mark.parametrize("name", ["att.w1", "att.key.weight", "ffn.value.weight"])
def test_one_kind_of_product_is_enough_to_be_noticed(model, monkeypatch, name):
    shape = model.params[f"blocks.1.{name}"].shape
    real, linear = torch.Tensor.__matmul__, functional.linear

    def times(x, w):
        return real(x, w) + (1e-3 if w.shape == shape and len(x) == 40 else 0)

    monkeypatch.setattr(torch.Tensor, "__matmul__", times)
    monkeypatch.setattr(
        functional, "linear", lambda x, w: linear(x, w) + (1e-3 if w.shape == shape and len(x) == 40 else 0)
    )
    assert examine(model, 64).multiple == 16, "40 is a multiple of 8 only"


@pytest.mark.bits
def test_int8_products_are_compared_as_they_are_made(model, monkeypatch):
    params, scales = dict(model.params), {}
    for name, tensor in model.params.items():
        if int8.is_quantizable(name, tuple(tensor.shape)):
            params[name], scales[name] = int8.quantize(tensor)
    held, linear = Model(params, model.arch, scales), int8.linear
    assert examine(held, 64) == Verdict()
    monkeypatch.setattr(int8, "linear", lambda x, matrix: linear(x, matrix) + (1e-3 if len(x) == 8 else 0))
    assert examine(held, 64).multiple == 16


@pytest.mark.bits
def test_a_perturbation_that_depends_on_the_other_rows_is_noticed(model, monkeypatch):
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, w: bmm(x, w) + (1e-3 if len(x) == 24 else 0))
    for is_fused in (False, True):  # the fused engine leaves the head's to torch
        assert examine(model, 64, is_fused=is_fused).multiple == 16


@pytest.mark.bits
def test_a_large_matrix_is_met_as_a_whole_too(model, monkeypatch):
    monkeypatch.setattr(batch, "_SAMPLE", 0)
    linear = functional.linear
    monkeypatch.setattr(functional, "linear", lambda x, w: linear(x, w) + (1e-3 if (len(x), len(w)) == (8, 512) else 0))
    assert examine(model, 64).multiple == 16


@pytest.mark.bits
def test_threads_that_change_sums_are_told(model, monkeypatch):
    real, before = torch.Tensor.__matmul__, torch.get_num_threads()
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, w: real(x, w) + 1e-3 * (torch.get_num_threads() > 1))
    assert examine(model, 64, 1) == examine(model, 64, 2, is_fused=True) == Verdict()
    verdict = examine(model, 64, 2)
    assert (verdict.by_rows, verdict.by_threads) == ((), "blocks.0.att.w1") and "the number of threads" in advice(
        verdict
    )
    assert torch.get_num_threads() == before


@pytest.mark.bits
def test_a_head_whose_words_are_shared_out_with_other_bits_is_told(model, monkeypatch):
    mm = torch.mm

    def of_few_words(x, w, out=None):
        y = mm(x, w) + (1e-3 if w.shape[1] == 24 else 0)
        return libraries.into(out, y)

    monkeypatch.setattr(torch, "mm", of_few_words)
    assert examine(model, 64, 2, is_fused=True) == Verdict()
    verdict = examine(model, 64, 3, is_fused=True)
    assert verdict == Verdict(by_threads="head.weight") and "--threads" in advice(verdict)


@pytest.mark.parametrize(
    ("count", "parts", "multiple", "fewest", "expected"),
    [
        (100, 2, 8, 1, [(0, 56), (56, 100)]),
        (64, 3, 8, 1, [(0, 24), (24, 48), (48, 64)]),
        (64, 3, 8, 32, [(0, 32), (32, 64)]),
        (16, 4, 16, 32, [(0, 16)]),
    ],
)
def test_threads_get_shares_of_full_multiples(count, parts, multiple, fewest, expected):
    assert batch.shares(count, parts, multiple, fewest) == expected


@pytest.mark.bits
def test_a_program_of_ones_own_gets_the_multiple_too(library, monkeypatch):
    monkeypatch.setattr("rwkv_es.engine.generate._multiples", {})
    tiny, tokenizer = load_model("tiny")
    library(lambda rows: rows % 32 != 0)
    prompts = [f"{i} + {i} = " for i in range(20)]
    options = {"max_new_tokens": 6, "sampling": HOT, "engine": "torch"}
    asked = []
    monkeypatch.setattr("rwkv_es.engine.generate.examined", lambda *a: asked.append(a) or examined(*a))
    texts = [generate(tiny, tokenizer, prompts, slots=slots, **options) for slots in (8, 24, 96, 96)]
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > 10
    assert len(asked) == 3, "once for a kind of model and way of decoding"


@pytest.mark.promise
@pytest.mark.parametrize("engine", ["torch", "numba"])
def test_slots_and_threads_change_nothing_on_this_machine(model, engine):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.params.items()}
    noise = Noise(0, select(shapes, {"matrices": 1.0, "head.weight": 3.0}, 2)).at(0, 0.05)
    factors, requests = draw_factors(noise, model, range(8)), requests_of(16, 5, max_new_tokens=6)
    found = []
    for slots, threads in ((8, 1), (24, 2), (64, 1), (80, 1)):
        multiple = examine(model, slots, threads, is_fused=engine == "numba", rank=2).multiple
        decoding = GenerationConfig(NEVER, HOT, slots, engine, threads, multiple)
        with torch_threads(threads):
            found.append(rollout(model, requests, decoding, factors).completions)
    assert all(completions == found[0] for completions in found)


def test_machines_are_judged_together():
    joined = Verdict(16, ("a",)).joined(Verdict(8, ("b", "a"), "c"))
    assert joined == Verdict(16, ("a", "b"), "c")


def test_rows_are_padded_to_a_full_multiple():
    assert [padded(n, 16) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]


@pytest.mark.parametrize(
    ("flags", "given", "expected"),
    [
        ("fpu fma avx2 avx512f avx512cd avx512bw avx512dq avx512vl avx512_bf16", None, "AVX512,STRICT"),
        ("fpu fma avx2 avx512f avx512cd avx512er avx512pf", None, "AVX2,STRICT"),
        ("fpu fma avx avx2", None, "AVX2,STRICT"),
        ("fpu avx avx2", None, None),
        ("fpu sse2", None, None),
        ("fpu avx2 avx512f", "COMPATIBLE", "COMPATIBLE"),
    ],
)
def test_the_librarys_mode_follows_the_cpu_where_the_user_said_nothing(monkeypatch, flags, given, expected):
    monkeypatch.setattr(batch, "_cpu_flags", lambda: set(flags.split()))
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.delenv("MKL_CBWR", raising=False)
    if given:
        monkeypatch.setenv("MKL_CBWR", given)
    batch.choose_blas_mode()
    assert os.environ.get("MKL_CBWR") == expected
    monkeypatch.delenv("MKL_CBWR", raising=False)


def test_the_command_sets_the_mode_and_importing_the_package_does_not():
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    code = "import os, rwkv_es; rwkv_es.ES; a = os.environ.get('MKL_CBWR'); print(a)"
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert found.stdout == "None\n"
    code = (
        "import os; from rwkv_es.cli import main; main(['--version']); import torch; print(os.environ.get('MKL_CBWR'))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True, cwd=ROOT
    )
    flags = batch._cpu_flags()
    expected = "AVX512,STRICT" if "avx512vl" in flags else "AVX2,STRICT" if {"avx2", "fma"} <= flags else "None"
    assert found.stdout.splitlines()[-1] == expected
