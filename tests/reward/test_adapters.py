"""Rewards as TRL, verl and plain Python write them, unmodified; alone, several, and through the worker processes."""

import pytest

from rwkv_es.errors import RewardError
from rwkv_es.reward.adapters import Answer, form_of, gold_of, load_function, load_scorer, parse_rewards
from rwkv_es.reward.pool import RewardPool
from rwkv_es.task import Problem, Task

TRL = """
import asyncio, re
from neighbour import TWO

def longer(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

def boxed(completions, ground_truth, **kwargs):
    matches = [re.search(r"\\\\boxed\\{(.*?)\\}", completion) for completion in completions]
    contents = [match.group(1) if match else "" for match in matches]
    return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth)]

def think_format(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*?</think>", content, re.DOTALL) else 0.0 for content in contents]

def of_maths(prompts, completions, subject, **kwargs):
    return [TWO if s == "maths" and p else None for s, p in zip(subject, prompts)]

async def slow(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [0.25] * len(completions)

def logs(completions, level, log_extra=None, log_metric=None, trainer_state=None, **kwargs):
    log_extra("level", level)
    log_extra("words", ["text is no metric"])
    log_metric("length", len(completions[0]))
    return [float(trainer_state.global_step)]

def strict(completions, answer):
    return [float(a in c) for c, a in zip(completions, answer)]

def two_for_one(completions, **kwargs):
    return [1.0, 2.0]

def a_number(completions, **kwargs):
    return 1.0
"""
VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if data_source != "maths/set":
        raise NotImplementedError(data_source)
    return {"score": float(ground_truth in solution_str), "chars": len(solution_str), "split": extra_info["split"]}

def short(solution_str, ground_truth):
    return float(solution_str == ground_truth)

def of_task(data_source, solution_str, ground_truth, extra_info):
    return 1.0 if (data_source, extra_info) == ("t", {"level": 3}) else 0.0

def no_score(solution_str, ground_truth):
    return {"points": 1}
"""
PLAIN = """
same = lambda completion, answer: float(completion.strip() == answer)

def length(completion):
    return -len(completion)

def ours(problem, text):
    return float(text == " x" and problem.answer == "42")

def none(completion, answer):
    return None

def sometimes(completion, answer):
    return 4.0 if "42" in completion else None

class Scorer:
    def __call__(self, completion, answer):
        return 0.5

instance = Scorer()
constant = 3

def three(a, b, c):
    return 0.0
"""
META = {
    "ground_truth": "42",
    "level": 3,
    "subject": "maths",
    "data_source": "maths/set",
    "extra_info": {"split": "train"},
}
PROBLEM = Problem("6 * 7?", "#### 42", META)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    for name, text in (("trl", TRL), ("verl", VERL), ("plain", PLAIN), ("neighbour", "TWO = 2.0\n")):
        (folder / f"{name}.py").write_text(text)
    return folder


def task() -> Task:
    return Task("t", lambda split: [], lambda problem, text: 0.125, "1", (), 8, "raw")


def score(folder, reference, text, problem=PROBLEM, signature="auto", step=0, token_ids=None):
    scorer = load_scorer(task(), f"{folder}/{reference}", signature)
    return scorer(Answer(problem, text, token_ids, step))


@pytest.mark.parametrize(
    ("reference", "text", "value"),
    [
        ("trl.py:boxed", r"so \boxed{42}", 1.0),
        ("trl.py:boxed", r"so \boxed{41}", 0.0),
        ("trl.py:of_maths", "", 2.0),
        ("trl.py:slow", "", 0.25),
        ("verl.py:compute_score", "it is 42", 1.0),
        ("verl.py:compute_score", "it is 41", 0.0),
        ("verl.py:short", " 42", 1.0),
        ("verl.py:short", "42.", 0.0),
        ("plain.py:same", " 42\n", 1.0),
        ("plain.py:same", " 43\n", 0.0),
        ("plain.py:length", " four", -4),
        ("plain.py:none", "", None),
        ("plain.py:instance", "", 0.5),
    ],
)
def test_each_form_is_told_by_its_parameters_and_called_as_it_is(folder, reference, text, value):
    assert score(folder, reference, text).value == value


def test_our_own_form_gets_the_text_as_it_is(folder):
    assert score(folder, "plain.py:ours", " x", Problem("", "42")).value == 1.0


def test_a_reward_gets_the_answer_column_as_the_row_has_it(folder):
    assert score(folder, "trl.py:strict", "so 42", Problem("", "42", {"other": 1})).value == 1.0
    assert gold_of(Problem("", "7", {"answer": 7})) == 7
    assert gold_of(Problem("", "7", {"reward_model": {"style": "rule", "ground_truth": "8"}})) == "8"
    assert gold_of(Problem("", "7")) == "7"


def test_a_row_without_a_source_is_the_tasks(folder):
    assert score(folder, "verl.py:of_task", "", Problem("", "", {"level": 3})).value == 1.0


def test_messages_are_given_where_the_row_has_them_or_it_is_asked_for(folder):
    row = Problem("q", "", {"prompt": [{"role": "user", "content": "q"}]})
    assert score(folder, "trl.py:think_format", " <think>a</think>b", row).value == 1.0
    assert score(folder, "trl.py:think_format", " <think>a</think>b", signature="trl_messages").value == 1.0
    assert score(folder, "trl.py:think_format", " <think>ab", signature="trl_messages").value == 0.0


def test_token_ids_are_given_where_they_are_known(folder):
    assert score(folder, "trl.py:longer", "abc", token_ids=[5, 6]).value == 2.0
    with pytest.raises(ValueError, match="no token ids are known"):
        score(folder, "trl.py:longer", "abc")


def test_what_a_reward_logs_becomes_a_metric_if_it_is_a_number(folder):
    assert score(folder, "trl.py:logs", "abcd", step=7) == (
        7.0,
        {"log/level": 3.0, "log/length": 4.0, "reward/logs": 7.0},
    )
    assert score(folder, "verl.py:compute_score", "42").logs == {"log/chars": 2.0, "reward/compute_score": 1.0}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("trl.py:two_for_one", r"one value per completion \(1\); got \[1.0, 2.0\]"),
        ("trl.py:a_number", "must return a list"),
        ("verl.py:no_score", r"needs the key 'score'; got \['points'\]"),
    ],
)
def test_what_is_returned_is_checked(folder, reference, message):
    with pytest.raises(ValueError, match=message):
        score(folder, reference, "")


def test_several_rewards_are_added_with_their_weights_and_none_is_left_out(folder):
    spec = f"{folder}/plain.py:same=0.5, {folder}/plain.py:none=9,{folder}/plain.py:length=-0.25,builtin:task"
    outcome = load_scorer(task(), spec)(Answer(PROBLEM, "42"))
    assert outcome.value == 0.5 * 1.0 + -0.25 * -2 + 0.125
    assert outcome.logs == {"reward/same": 1.0, "reward/length": -2.0, "reward/task": 0.125}
    spec = f"{folder}/plain.py:none,{folder}/plain.py:none=2"
    assert load_scorer(task(), spec)(Answer(PROBLEM, "42")).value is None


def test_without_a_reward_of_ones_own_the_task_scores():
    assert load_scorer(task(), "")(Answer(PROBLEM, "x")) == (0.125, {})


def test_a_form_may_be_said_where_names_mislead(folder):
    assert score(folder, "plain.py:same", "42", signature="plain").value == 1.0
    with pytest.raises(RewardError, match=r"three' takes \(a, b, c\); known forms: .* --reward-signature"):
        score(folder, "plain.py:three", "42")


def test_functions_are_loaded_from_modules_too(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert load_function("plain:length")("ab") == load_function("plain.length")("ab") == -2
    assert form_of(load_function("plain:length"), "") == "plain"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/none.py:f", "cannot be imported: FileNotFoundError: there is no file .*none.py"),
        ("{}/plain.py", "names no function; write file.py:function"),
        ("{}/plain.py:nothing", "has no function 'nothing'"),
        ("{}/plain.py:constant", "has no function 'constant'"),
        ("no_such_package.rewards:f", "cannot be imported: ModuleNotFoundError"),
        ("f", "names no function"),
        ("builtin:nothing", "built in are builtin:task, builtin:format, builtin:length"),
        ("builtin:length:x", "a number of characters above 0; got 'x'"),
        ("builtin:format:1", "takes nothing after it"),
        ("{}/plain.py:same=much", "with commas between several; got"),
        ("{}/plain.py:same,", "with commas between several; got ''"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_refused_in_one_sentence(folder, spec, message):
    with pytest.raises(RewardError, match=message) as caught:
        load_scorer(task(), spec.format(folder))
    assert "\n" not in str(caught.value)


def test_weights_are_read():
    assert parse_rewards("a.py:f=0.7,b.c:g=-2,d.e") == [("a.py:f", 0.7), ("b.c:g", -2.0), ("d.e", 1.0)]


def test_workers_load_the_rewards_and_their_logs_are_averaged(folder):
    spec = f"{folder}/trl.py:longer=2,{folder}/verl.py:compute_score,{folder}/plain.py:sometimes=0"
    with RewardPool("copy", "", 1, 10.0, 1.0, reward=spec) as pool:
        scores = pool.score([PROBLEM] * 3, ["42", "", "4242"], [[1], [], [1, 2]], step=3)
    assert scores.rewards == [3.0, 0.0, 5.0], scores.first_error
    assert scores.metrics == {
        "log/chars": 2.0,
        "reward/compute_score": pytest.approx(2 / 3),
        "reward/longer": 1.0,
        "reward/sometimes": 4.0,  # of the two that it applies to
    }


def test_a_reward_that_a_worker_cannot_load_is_one_sentence(folder):
    pool = RewardPool("copy", "", 1, 10.0, 1.0, reward=f"{folder}/none.py:f")
    with pool, pytest.raises(RewardError, match=r"cannot load the task:\nthe reward .*none.py:f' cannot be imported"):
        pool.score([PROBLEM], ["42"])
