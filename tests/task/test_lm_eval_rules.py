"""The two GSM8K rules of lm-evaluation-harness: by hand, on the whole test set, and against the harness itself."""

import json
import random
import re
from pathlib import Path

import pytest
from places import DATA
from timing import cpu_seconds

from rwkv_es.task import lm_eval_rules
from rwkv_es.task.lm_eval_rules import RULES, exact_match, flexible_extract, scores, strict_match

CASES = [  # text, strict, flexible
    ("So she has 16 - 7 = 9.\n#### 18", "18", "18"),
    ("#### 7\n\nQuestion: more\n#### 8", "7", "8"),
    ("The answer is 18.", "[invalid]", "18."),
    ("It costs $1,234.50 now", "[invalid]", "$1,234.50"),
    ("#### -5", "-5", "-5"),
    ("#### $5", "[invalid]", "$5"),
    ("that is 5 apples", "[invalid]", "5"),
    ("10-3", "[invalid]", "-3"),
    ("7 it is ...", "[invalid]", "..."),
    ("no number at all", "[invalid]", "[invalid]"),
    ("", "[invalid]", "[invalid]"),
    ("####18", "[invalid]", "18"),
    ("#### 1,000.", "1,000.", "1,000."),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), CASES)
def test_extraction_by_hand(text, strict, flexible):
    assert (strict_match(text), flexible_extract(text)) == (strict, flexible)


@pytest.mark.parametrize(
    ("extracted", "gold", "is_equal"),
    [
        ("18", "Janet sells 9 * 2 = $<<9*2=18>>18.\n#### 18", True),
        ("1,000.", "#### 1000", True),
        ("$5", "#### 5", True),
        ("5.0", "#### 5", False),
        ("-5", "#### 5", False),
        ("[INVALID]", "[invalid]", True),
    ],
)
def test_comparison_by_hand(extracted, gold, is_equal):
    assert exact_match(extracted, gold) is is_equal


@pytest.mark.parametrize("piece", ["5", "#", "#### ", ".", "5.", ", ", "$", "-", "\n", "#### 5", "a.\n"])
def test_long_texts_take_no_longer_than_their_length(piece):
    text = (piece * 1_000_000)[:1_000_000]
    assert cpu_seconds(lambda: scores(text, "#### 5")) < 2.0  # a tenth of that; quadratic time would be hours


@pytest.mark.parametrize("seed", range(200))
def test_what_is_ignored_is_what_the_harness_ignores(seed):
    """Its four patterns, one after the other, on short texts of the signs that matter."""
    random_text = "".join(random.Random(seed).choices(["#### ", "####", ",", "$", ".", "5", "\n", "A", " "], k=12))
    expected = random_text
    for pattern in (",", r"\$", "(?s).*#### ", r"\.$"):
        expected = re.sub(pattern, "", expected)
    assert lm_eval_rules._normal(random_text) == expected.lower()


def test_the_harness_agrees():
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    metrics = pytest.importorskip("lm_eval.api.metrics")
    import lm_eval
    import yaml

    file = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    task = yaml.safe_load(file.read_text())
    options = {key: task["metric_list"][0][key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    texts = [text for text, _, _ in CASES]
    for entry in task["filter_list"]:
        arguments = {key: value for key, value in entry["filter"][0].items() if key != "function"}
        theirs = extraction.RegexFilter(**arguments).apply([texts], [{}])[0]
        assert [RULES[entry["name"]](text) for text in texts] == theirs
        for extracted in theirs:
            for gold in ("#### 18", "x\n#### 1,000", "#### 5"):
                their_score = metrics.exact_match_hf_evaluate([extracted], [gold], **options)["exact_match"]
                assert exact_match(extracted, gold) == bool(their_score)


def test_a_model_that_answers_known_texts_gets_the_known_scores():
    """Of 1319 answers 1000 are full solutions, 200 name the number in a sentence, 119 are wrong."""
    from rwkv_es.measure.judgement import Judged, of_harness
    from rwkv_es.task import load_task

    file = DATA / "gsm8k" / "test.jsonl"
    if not file.exists():
        pytest.skip(f"the GSM8K test set is not there: {file}")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    task = load_task("gsm8k", str(file))
    problems = task.problems("test")
    texts = [row["solution"] for row in rows[:1000]]
    texts += [f"The answer is {row['answer']}." for row in rows[1000:1200]]
    texts += ["I do not know."] * 119
    found = of_harness(task, Judged(problems, texts, [0.0] * 1319))
    assert {name: sum(values) for name, values in found.items()} == {
        "exact_match,strict-match": 1000,
        "exact_match,flexible-extract": 1200,
    }
    assert sum(task.reward(problem, text) for problem, text in zip(problems, texts)) == 1200
    assert scores(texts[0], rows[0]["solution"]) == {
        "exact_match,strict-match": 1.0,
        "exact_match,flexible-extract": 1.0,
    }
