"""What `from rwkv_es import ...` gives a program of one's own."""

import runpy
import subprocess
import sys

import pytest
import reference
import torch
from models import make_model, random_tokens
from places import ROOT

import rwkv_es
from rwkv_es.system.errors import ConfigError

TOKENIZER = str(ROOT / "rwkv_es" / "tiny" / "rwkv7-tiny.tokenizer.json")


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


PROBLEMS = [rwkv_es.Problem(f"{a} {b} 10={a + b + 10}:", str(a + b)) for a in range(1, 5) for b in range(1, 4)]
SMALL = {"population": 4, "prompts": 2, "steps": 2, "sigma": 0.02, "max_new_tokens": 8, "tracker": "none"}


def test_problems_and_functions_of_ones_own_train_and_evaluate(tmp_path):
    seen = []

    def reward(completion, answer):
        seen.append((completion, answer))
        return len(completion) / 10

    threads, path = torch.get_num_threads(), list(sys.path)
    task = rwkv_es.load_task(PROBLEMS, reward, held_out=PROBLEMS[:3], max_new_tokens=8)
    folder = rwkv_es.train(task=task, run=str(tmp_path / "run"), threads=1, **SMALL)
    assert (folder / "ledger.jsonl").read_text().count("\n") == 2
    assert {answer for _, answer in seen} <= {problem.answer for problem in PROBLEMS}
    found = rwkv_es.evaluate(
        model=str(folder / "snapshots" / "step-000002" / "model.pth"), task=task, tokenizer=TOKENIZER
    )
    assert found["problems"] == 3 and found["reward"] == pytest.approx(sum(len(text) for text, _ in seen[-3:]) / 30)
    assert rwkv_es.evaluate(model=str(folder), task=task, tokenizer=TOKENIZER)["reward"] == found["reward"]
    out = rwkv_es.export(folder, tmp_path / "tuned.pth")
    assert rwkv_es.load_model(str(out), tokenizer=TOKENIZER)[0].arch == rwkv_es.load_model("tiny")[0].arch
    assert torch.get_num_threads() == threads and sys.path == path


def test_a_function_may_replace_the_reward_of_a_built_in_task(tmp_path):
    found = rwkv_es.evaluate(reward=lambda completions, **_: [0.25] * len(completions), eval_size=4, max_new_tokens=4)
    assert found["reward"] == 0.25


def test_without_held_out_problems_there_is_no_evaluation(tmp_path):
    task = rwkv_es.load_task(PROBLEMS, lambda problem, text: float(len(text)), max_new_tokens=4)
    folder = rwkv_es.train(task=task, run=str(tmp_path / "run"), **SMALL)
    assert "eval/" not in (folder / "metrics.jsonl").read_text()


def test_the_weights_of_an_es_are_exported_in_the_bases_layout(tmp_path, tiny):
    model, _ = rwkv_es.load_model("tiny")
    es = rwkv_es.ES(model, population=2, sigma=0.1, lr=1.0)
    es.tell([1.0, 0.0])
    path = rwkv_es.export(es, tmp_path / "tuned.pth")
    tuned = rwkv_es.load_model(str(path), tokenizer=TOKENIZER)[0]
    assert torch.equal(tuned.params["blocks.0.ffn.key.weight"], model.params["blocks.0.ffn.key.weight"])
    assert not torch.equal(tuned.params["blocks.0.ffn.key.weight"], tiny[0].params["blocks.0.ffn.key.weight"])
    with pytest.raises(ConfigError, match="was not loaded from a file"):
        rwkv_es.export(rwkv_es.ES(make_model(tmp_path), population=2), tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rwkv_es.load_task([], lambda text: 1.0), "problems and a reward"),
        (lambda: rwkv_es.load_task(PROBLEMS), "problems and a reward"),
        (lambda: rwkv_es.train(sigm=1), "did you mean sigma"),
        (
            lambda: rwkv_es.evaluate(task=rwkv_es.load_task(PROBLEMS, len), reward="a.py:f"),
            "a reward that is a function",
        ),
    ],
)
def test_what_cannot_be_used_is_one_sentence(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


@pytest.mark.slow
def test_the_example_tunes_the_embedded_model_by_50_points(capsys):
    runpy.run_path(str(ROOT / "examples" / "ask_tell.py"))
    lines = capsys.readouterr().out.splitlines()
    before, after = int(lines[0].split()[1].rstrip("%")), int(lines[-1].split()[1].rstrip("%"))
    assert len(lines) == 18 and after >= before + 50
