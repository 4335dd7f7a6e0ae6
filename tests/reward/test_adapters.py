"""Rewards as TRL, verl and plain Python write them, unmodified; alone, several, and through the worker processes."""

import re

import pytest
from timing import patiently

from rwkv_es.reward.adapters import Answer, Outcome, gold_of, load_scorer, parse_rewards
from rwkv_es.reward.loading import form_of, load_function
from rwkv_es.reward.pool import RewardPool
from rwkv_es.reward.sheet import Group
from rwkv_es.system.errors import RewardError
from rwkv_es.task import SYSTEM, Problem, Task
from rwkv_es.task.task import PART

TRL = """
import asyncio, functools, re
import numpy as np
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

def relative(completions, **kwargs):
    order = sorted(len(c) for c in completions)
    return [float(order.index(len(c))) for c in completions]

def longest_may_fail(completions, **kwargs):
    if any("fail" in c for c in completions):
        raise KeyError("fail")
    return [float(len(completions))] * len(completions)

def no_texts(completions):
    contents = [completion[0]["content"] for completion in completions]
    return [float(content.endswith("42")) for content in contents]

def last_message(completions, **kwargs):
    try:
        return [float("42" in c[-1].get('content')) for c in completions]
    except Exception:
        return [0.0] * len(completions)

def _contents(completions):
    return [message["content"] for completion in completions for message in completion]

def by_a_helper(prompts, completions, answer, **kwargs):
    assert prompts[0][-1]["role"] == "user"
    return [float(a in c) for a, c in zip(answer, _contents(completions))]

class Checks:
    def __call__(self, completions, **kwargs):
        return [float("42" in c[0]["content"]) for c in completions]

checks = Checks()
bound = functools.partial(no_texts)

def a_column(completions, content, **kwargs):
    return [float(kwargs["content"] in c) if "content" in kwargs else float(content[0] in c) for c in completions]

def keys(completions, **kwargs):
    return [float(len([name for name in kwargs if name in ("part_of_mixture", "system_of_prompt")]))]

def array(completions, **kwargs):
    return np.array([float(len(c)) for c in completions])

def column_or_none(completions, hint, **kwargs):
    return [float(h is None) for h in hint]

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
    return alone(scorer, Answer(problem, text, token_ids, step))


def alone(scorer, answer) -> Outcome:
    (outcome,) = scorer.score([answer])
    return outcome


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
        ("trl.py:array", "abc", 3.0),
        ("trl.py:no_texts", " so 42", 1.0),
        ("trl.py:no_texts", "so 41", 0.0),
        ("trl.py:last_message", "so 42", 1.0),
        ("trl.py:by_a_helper", "so #### 42", 1.0),
        ("trl.py:checks", "so 42", 1.0),
        ("trl.py:bound", "so 42", 1.0),
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
    outcome = alone(load_scorer(task(), spec), Answer(PROBLEM, "42"))
    assert outcome.value == 0.5 * 1.0 + -0.25 * -2 + 0.125
    assert outcome.logs == {"reward/same": 1.0, "reward/length": -2.0, "reward/task": 0.125}
    spec = f"{folder}/plain.py:none,{folder}/plain.py:none=2"
    assert alone(load_scorer(task(), spec), Answer(PROBLEM, "42")).value is None


def test_without_a_reward_of_ones_own_the_task_scores():
    assert alone(load_scorer(task(), ""), Answer(PROBLEM, "x")) == (0.125, {})


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


def test_messages_are_told_by_the_source_and_columns_of_that_name_are_none(folder):
    forms = {name: form_of(load_function(f"{folder}/trl.py:{name}"), name) for name in ("strict", "a_column", "slow")}
    assert set(forms.values()) == {"trl"}
    assert score(folder, "trl.py:a_column", "so 42", Problem("", "", {"content": "42"})).value == 1.0


def test_columns_may_have_any_name_and_null_is_handed_on(folder):
    named_like_ours = Problem(
        "", "", {"part_of_mixture": 3, "system_of_prompt": "x", PART: 1, SYSTEM: "y", "hint": None}
    )
    assert score(folder, "trl.py:keys", "", named_like_ours).value == 2.0
    assert score(folder, "trl.py:column_or_none", "", named_like_ours).value == 1.0
    assert gold_of(Problem("", "7", {"answer": None, "ground_truth": None})) == "7"


def test_what_compares_sees_the_answers_of_a_group_together_and_alone_where_that_fails(folder):
    answers = [Answer(PROBLEM, text) for text in ("ab", "a", "abc")]
    scorer = load_scorer(task(), f"{folder}/trl.py:relative,{folder}/plain.py:length=10")
    assert scorer.compares and [outcome.value for outcome in scorer.score(answers)] == [1 - 20, 0 - 10, 2 - 30]
    assert not load_scorer(task(), f"{folder}/plain.py:length").compares


def pool_with(reward: str, workers: int, error_limit: float = 1.0) -> RewardPool:
    return RewardPool("copy", "", workers, 10.0, error_limit, reward=reward)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_groups_are_scored_whole_whatever_the_order_of_the_answers(folder, workers):
    texts = {4: "abcd", 0: "a", 3: "ab", 1: "abc", 2: "", 5: "fail"}
    groups = {0: "x", 1: "x", 3: "x", 2: "y", 4: "y", 5: "z"}
    with pool_with(f"{folder}/trl.py:relative", workers) as pool:
        for order in (list(texts), sorted(texts), sorted(texts, reverse=True)):
            for place in order:
                name = groups[place]
                pool.submit(place, Answer(PROBLEM, texts[place]), Group(name, list(groups.values()).count(name)))
                pool.poll()
            assert pool.gather().rewards == [0.0, 2.0, 0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_in_a_group_costs_its_own_answer_alone(folder, workers):
    with pool_with(f"{folder}/trl.py:longest_may_fail", workers) as pool:
        for place, text in enumerate(("a", "fail", "b", "c", "d")):
            pool.submit(place, Answer(PROBLEM, text), Group(place // 3, 3 - place // 3))
        scores = pool.gather()
    assert scores.rewards == [1.0, 0.0, 1.0, 2.0, 2.0], "those beside it alone, the others in twos"
    assert scores.causes.keys() == {1} and "KeyError: 'fail' (trl.py, line" in scores.causes[1]


def test_a_reward_that_hangs_in_a_group_costs_its_own_answer_alone(tmp_path):
    (tmp_path / "hangs.py").write_text(
        "def f(completions, **kwargs):\n    while 'hang' in completions: pass\n    return [float(len(completions))] * len(completions)\n"
    )

    def check(limit_s):
        with RewardPool("copy", "", 1, limit_s, 1.0, reward=f"{tmp_path}/hangs.py:f") as pool:
            for place, text in enumerate(("a", "hang", "b")):
                pool.submit(place, Answer(PROBLEM, text), Group("all", 3))
            scores = pool.gather()
        assert (scores.rewards, scores.errors, scores.timeouts) == ([1.0, 0.0, 1.0], 0, 1)

    patiently(check, (0.3, 1.2, 4.8))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_client_may_be_kept_between_calls(tmp_path, workers):
    (tmp_path / "client.py").write_text(
        "import asyncio\n"
        "try:\n    at_import = asyncio.get_event_loop()\nexcept RuntimeError:\n    at_import = None\n"
        "class Client:\n    loop = at_import\n"
        "    async def ask(self):\n        self.loop = self.loop or asyncio.get_running_loop()\n"
        "        assert self.loop is asyncio.get_running_loop() and not self.loop.is_closed()\n        return 0.5\n"
        "client = Client()\n"
        "async def judge(completions, **kwargs):\n    return await asyncio.gather(*[client.ask() for _ in completions])\n"
    )
    with pool_with(f"{tmp_path}/client.py:judge", workers) as pool:
        assert pool.score([PROBLEM] * 3, ["a", "b", "c"]).rewards == [0.5] * 3


def test_sums_beyond_any_use_are_failures_and_reach_no_metric(tmp_path):
    (tmp_path / "large.py").write_text(
        "def a(completion, answer): return float(completion)\ndef v(solution_str): return {'score': 1, 'log': float(solution_str)}"
    )
    spec = f"{tmp_path}/large.py:a=2,{tmp_path}/large.py:v"
    with pool_with(spec, 0) as pool:
        scores = pool.score([PROBLEM] * 4, ["1e308", "9e29", "-1e308", "2"])
    assert (scores.rewards, scores.errors) == ([0.0, 0.0, 0.0, 5.0], 3)
    assert scores.first_cause == "ValueError: the reward a must lie between -1e+30 and 1e+30; got 1e+308"
    assert scores.metrics == {"log/log": 2.0, "reward/a": 2.0, "reward/v": 1.0}


def test_the_first_failure_is_said_once(folder, capsys):
    with pool_with(f"{folder}/trl.py:longest_may_fail", 0) as pool:
        for _ in range(2):
            pool.say_failure(pool.score([PROBLEM] * 3, ["ok", "fail", "fail"]))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "rwkv-es: the reward failed on 2 of 3 answers, which count as 0 (reported once; reward_errors counts on); the "
        "first time:"
    )
    assert re.match(rf'  File "{folder}/trl\.py", line \d+, in longest_may_fail', said[1])
    assert said[-2:] == ["  KeyError: 'fail'", f"  on the answer 'fail' to {PROBLEM.prompt!r}"] and len(said) < 15


DEEP = """
import json

def score(completion, answer):
    return outer(completion, 20)

def outer(text, depth):
    return outer(text, depth - 1) if depth else inner(text)

def inner(text):
    return json.loads(text)["score"]
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_is_a_short_traceback_of_the_users_own_frames(tmp_path, capsys, workers):
    (tmp_path / "deep.py").write_text(DEEP)
    with pool_with(f"{tmp_path}/deep.py:score", workers) as pool:
        pool.say_failure(pool.score([PROBLEM], ["no json" * 40]))
    said = capsys.readouterr().err.splitlines()
    assert len(said) < 15
    frames = [line.strip() for line in said if line.strip().startswith("File")]
    assert frames[0] == f'File "{tmp_path}/deep.py", line 5, in score'
    assert frames[-1] == f'File "{tmp_path}/deep.py", line 11, in inner', "not the library's, where it was raised"
    assert 'return json.loads(text)["score"]' in "\n".join(said) and "JSONDecodeError: Expecting value" in said[-2]


def test_where_too_many_fail_the_first_failure_is_shown_before_the_end(tmp_path, capsys):
    (tmp_path / "deep.py").write_text(DEEP)
    with (
        pool_with(f"{tmp_path}/deep.py:score", 1, error_limit=0.1) as pool,
        pytest.raises(RewardError, match="failed on"),
    ):
        pool.score([PROBLEM] * 16, ["no json"] * 16)
    assert "line 11, in inner" in capsys.readouterr().err


def test_a_reward_of_trls_form_may_see_answers_to_several_problems(tmp_path):
    (tmp_path / "group.py").write_text(
        "def rank(prompts, completions, level, **columns):\n"
        "    assert len(set(prompts)) == 2 and level == [1, 1, 7]\n"
        "    return [float(len(c) == max(map(len, completions))) for c in completions]\n"
    )
    problems = [Problem("a", "", {"level": 1}), Problem("a", "", {"level": 1}), Problem("b", "", {"level": 7})]
    with pool_with(f"{tmp_path}/group.py:rank", 1) as pool:
        for place, (problem, text) in enumerate(zip(problems, ("x", "xxx", "xx"))):
            pool.submit(place, Answer(problem, text), Group("step", 3))
        assert pool.gather().rewards == [0.0, 1.0, 0.0]
