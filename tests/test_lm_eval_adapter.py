"""lm-evaluation-harness through the adapter: its three methods against float64 numpy, its GSM8K against ours."""

import json
from types import SimpleNamespace

import libraries
import numpy as np
import pytest
import reference
from checkpoints import random_params

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'rwkv-es[eval]'")

from rwkv_es.config.options import Config
from rwkv_es.lm_eval_adapter import RwkvLM, read_options, split
from rwkv_es.model.sampler import SamplingParams
from rwkv_es.pretrained import checkpoint
from rwkv_es.system.errors import ConfigError
from rwkv_es.task import lm_eval_rules
from rwkv_es.verbs.evaluate import evaluate, generate


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small random model with the World vocabulary."""
    path = tmp_path_factory.mktemp("world") / "world.pth"
    checkpoint.save(path, random_params(1, 64, 65536))
    return RwkvLM(model=str(path), batch_size=8, threads=1)


@pytest.fixture(scope="module")
def tiny():
    return RwkvLM(threads=1)


def asked(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def log_probability(lm, context, continuation):
    """Return log p(continuation | context) of token ids, in float64 numpy."""
    scores = reference.logits(lm.model.params, [*context, *continuation])
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    return sum(scores[len(context) - 1 + i, token] for i, token in enumerate(continuation))


def pair(lm, *texts, **options):
    """Return the ids, and the first that is predicted."""
    found = split(lm.tokenizer, *texts, **options)
    return found.ids, found.start


def test_a_pair_is_split_by_hand(world):
    encode = world.tokenizer.encode
    assert encode("a\n\nb") == [*encode("a"), 261, *encode("b")], "two line ends are one token"
    assert encode("a b") == [*encode("a"), *encode(" b")]
    assert pair(world, "a", " b") == (encode("a b"), 1)
    assert pair(world, "a\n", "\nb") == (encode("a\n\nb"), 1), "the merged token is predicted from a"
    assert pair(world, "a\n\n", "b") == (encode("a\n\nb"), 2)
    assert pair(world, "", "ab") == ((0, *encode("ab")), 1)
    assert pair(world, "\n", "\nb") == ((0, *encode("\n\nb")), 1), "nothing stands before the merged token"
    assert pair(world, "a\n\n", "b", has_bos=True) == ((0, *encode("a\n\nb")), 3)
    assert pair(world, "é\n\n", "b") == (encode("é\n\nb"), len(encode("é\n\n"))), "lengths are of bytes"


def test_log_likelihoods_equal_float64_numpy(world):
    encode = world.tokenizer.encode
    pairs = [
        ("The cat sat on the", " mat."),
        ("a\n", "\nb"),
        ("", "Hello world"),
        ("x", ""),
        ("User: hi\n\nAssistant:", " Yes"),
    ]
    found = world.loglikelihood(asked(*pairs))
    wanted = [
        log_probability(world, encode("The cat sat on the"), encode(" mat.")),
        log_probability(world, encode("a"), [261, *encode("b")]),
        log_probability(world, [0], encode("Hello world")),
        0.0,
        log_probability(world, encode("User: hi\n\nAssistant:"), encode(" Yes")),
    ]
    # 1e-3: fp32 against float64, summed over a few tokens of about -11 each
    assert [value for value, _ in found] == pytest.approx(wanted, abs=1e-3)
    assert [flag for _, flag in found] == [False, False, False, True, False]


def test_rolling_log_likelihoods_equal_float64_numpy(world):
    texts = ["The cat sat on the mat.\n\nIt slept.", "a", ""]
    found = world.loglikelihood_rolling(asked(*((text,) for text in texts)))
    wanted = [log_probability(world, [0], world.tokenizer.encode(text)) for text in texts[:2]]
    assert found == pytest.approx([*wanted, 0.0], abs=2e-3)


def test_what_greedy_says_is_greedy(tiny):
    (text,) = tiny.generate_until(asked(("3 7 10=24:", {"until": ["</answer>"], "max_gen_toks": 40})))
    (value, is_greedy), (less, is_other) = tiny.loglikelihood(
        asked(("3 7 10=24:", text), ("3 7 10=24:", text[:-1] + "7"))
    )
    assert is_greedy and not is_other
    assert value > less


def test_texts_end_before_the_first_of_the_until_strings(tiny):
    (whole,) = generate(Config(prompt="3 7 10=24:", threads=1))
    options = [{"until": []}, {"until": ["</answer>"]}, {"until": "+"}, {"until": ["nowhere", "("], "max_gen_toks": 99}]
    found = tiny.generate_until(asked(*(("3 7 10=24:", each) for each in options)))
    assert "</answer>" in whole and "+" in whole and "(" in whole
    assert found == [whole, whole.partition("</answer>")[0], whole.partition("+")[0], whole.partition("(")[0]]
    (short,) = tiny.generate_until(asked(("3 7 10=24:", {"max_gen_toks": 3})))
    assert whole.startswith(short) and len(tiny.tokenizer.encode(short)) == 3


def test_answers_come_back_in_the_order_of_the_requests(tiny):
    contexts = ["3 7 10=24:", "4 5 6=15:", "1 2 3=6:"]
    alone = [tiny.generate_until(asked((context, {"max_gen_toks": 30})))[0] for context in contexts]
    assert len(set(alone)) == 3
    mixed = [
        (context, {"max_gen_toks": 30, "until": until}) for context, until in zip(contexts, (["\n\n"], [], ["\n\n"]))
    ]
    assert tiny.generate_until(asked(*mixed)) == alone


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ((), 256, SamplingParams(7))),
        ({"until": "x", "max_new_tokens": 5, "do_sample": False, "temperature": 0.7}, (("x",), 5, SamplingParams(7))),
        ({"until": ["x"], "max_gen_toks": 4, "max_tokens": 5, "temperature": 0.7}, (("x",), 4, SamplingParams(7, 0.7))),
        ({"do_sample": True, "top_p": 0.9, "top_k": 5}, ((), 256, SamplingParams(7, 1.0, 0.9, 5))),
        ({"do_sample": False, "temperature": 0.0}, ((), 256, SamplingParams(7))),
    ],
)
def test_generation_options(options, expected):
    assert read_options(options, 7) == expected


def test_an_unknown_generation_option_is_refused():
    with pytest.raises(ConfigError, match="unknown generation option 'num_beams'"):
        read_options({"num_beams": 4}, 0)


def test_a_conversation_is_written_as_the_models_were_trained(tiny):
    history = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi \n"}]
    assert tiny.apply_chat_template(history) == "System: Be kind.\n\nUser: Hi\n\nAssistant:"
    history.append({"role": "assistant", "content": "Yes"})
    assert tiny.apply_chat_template(history, add_generation_prompt=False).endswith("User: Hi\n\nAssistant: Yes")


TASK = """
task: gsm8k_local
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: false,
     regexes_to_ignore: [",", "\\\\$", "(?s).*#### ", "\\\\.$"]}
generation_kwargs: {until: ["\\n\\nUser:"], do_sample: false, temperature: 0.0, max_gen_toks: 40}
num_fewshot: 0
filter_list:
  - {name: strict-match, filter: [{function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}, {function: take_first}]}
  - {name: flexible-extract, filter: [{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)"}, {function: take_first}]}
"""


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_the_harness_gives_the_same_gsm8k_scores(tmp_path, tiny, monkeypatch, capsys):
    """Its own rules and its own loop over a local data set, against `rwkv-es eval --task gsm8k`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    questions = [f"{a} {b} {c}=20:" for a in range(1, 6) for b in (3, 7) for c in (4, 10)]
    rows = [{"question": question, "answer": f"so\n#### {(1, 4, 10)[i % 3]}"} for i, question in enumerate(questions)]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "gsm8k_local.yaml").write_text(TASK.replace("DATA", str(data)))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = lm_eval.simple_evaluate(tiny, tasks=["gsm8k_local"], task_manager=manager, bootstrap_iters=0)
    ours = evaluate(
        Config(task="gsm8k", data=str(data), template="raw", max_new_tokens=40, threads=1, reward_workers=0)
    )
    scores = {
        f"exact_match,{name}": theirs["results"]["gsm8k_local"][f"exact_match,{name}"] for name in lm_eval_rules.RULES
    }
    assert 0 < scores["exact_match,flexible-extract"] < 1, "it must be possible to disagree"
    assert {name: ours[name] for name in scores} == scores


@pytest.mark.bits
@pytest.mark.parametrize("engine", ["torch", "numba"])
def test_the_batch_size_changes_no_bit(monkeypatch, engine):
    libraries.install(monkeypatch, lambda rows: rows == 8)  # MKL on CPUs with AVX-512
    pairs = asked(*[(f"{n % 9 + 1} 7 10=", f"24:\n{n % 7 + 1}+7=10") for n in range(40)])
    found = [RwkvLM(batch_size=size, threads=1, engine=engine).loglikelihood(pairs) for size in (1, 8, 24, 64)]
    assert found[1:] == found[:-1]
