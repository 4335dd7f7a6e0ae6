"""What `from rwkv_es import ...` gives a program of one's own."""

import runpy
import subprocess
import sys

import pytest
import reference
import torch
from places import ROOT
from test_forward import make_model, random_tokens

import rwkv_es
from rwkv_es.errors import ConfigError


@pytest.fixture(scope="module")
def tiny():
    return rwkv_es.load_model("tiny")


def test_every_public_name_is_there_and_importing_the_package_loads_no_torch():
    assert all(getattr(rwkv_es, name) is not None for name in rwkv_es.__all__)
    assert set(rwkv_es.__all__) <= set(dir(rwkv_es))
    with pytest.raises(AttributeError, match="no attribute 'tune'"):
        rwkv_es.tune  # noqa: B018
    code = "import rwkv_es, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_logits_of_a_text_are_those_of_float64_numpy(tmp_path):
    model = make_model(tmp_path)
    tokens = random_tokens(1, 9, 32, seed=5)[0]
    expected = reference.logits(model.params, tokens.tolist())[-1]
    found = model.logits(tokens.tolist())
    assert found.shape == (model.arch.n_vocab,) and found.dtype == torch.float32
    assert abs(found.double().numpy() - expected).max() < 1e-4


def test_the_members_of_a_population_answer_each_for_itself(tiny):
    model, tokenizer = tiny
    prompts = ["3 7 10=24:", "2 5 9=16:"]
    es = rwkv_es.ES(model, sigma=0.02, population=4, targets={"matrices": 1, "head.weight": 10})
    members = es.ask()
    rows = rwkv_es.generate(model, tokenizer, prompts, members, max_new_tokens=24)
    assert len(rows) == 4 and all(len(row) == 2 for row in rows)
    name = "blocks.0.att.key.weight"
    expected = rwkv_es.generate(model, tokenizer, prompts, max_new_tokens=24)
    assert expected != rows[0] or expected != rows[1]
    for few in (1, 3):
        assert rwkv_es.generate(model, tokenizer, prompts, members, max_new_tokens=24, slots=few) == rows
    assert torch.equal(model.params[name], rwkv_es.load_model("tiny")[0].params[name]), "nothing is perturbed in place"


def test_a_completion_ends_before_stop_and_after_stop_included(tiny):
    model, tokenizer = tiny
    whole = rwkv_es.generate(model, tokenizer, ["3 7 10=24:"], max_new_tokens=40)[0]
    middle = whole[3:5]
    before = rwkv_es.generate(model, tokenizer, ["3 7 10=24:"], max_new_tokens=40, stop=[middle])[0]
    after = rwkv_es.generate(model, tokenizer, ["3 7 10=24:"], max_new_tokens=40, stop_included=[middle])[0]
    assert before == whole[: whole.index(middle)] and after == before + middle


def test_no_prompts_are_no_texts_and_an_empty_prompt_is_refused(tiny):
    assert rwkv_es.generate(*tiny, []) == []
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        rwkv_es.generate(*tiny, ["3 7 10=24:", ""])


def test_global_state_is_left_alone(tiny):
    threads, path = torch.get_num_threads(), list(sys.path)
    rwkv_es.generate(*tiny, ["3 7 10=24:"], max_new_tokens=2)
    assert torch.get_num_threads() == threads and sys.path == path


@pytest.mark.slow
def test_the_example_tunes_the_embedded_model_by_50_points(capsys):
    runpy.run_path(str(ROOT / "examples" / "ask_tell.py"))
    lines = capsys.readouterr().out.splitlines()
    before, after = int(lines[0].split()[1].rstrip("%")), int(lines[-1].split()[1].rstrip("%"))
    assert len(lines) == 18 and after >= before + 50
