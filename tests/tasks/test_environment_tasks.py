"""Environments of other libraries, written after their documented interfaces; tools; the built-in games."""

import json
import os

import pytest
from jobs import arguments
from models import byte_model
from places import ROOT

from rwkv_es.cli import main
from rwkv_es.environment.play import Game, played
from rwkv_es.system.errors import TaskError
from rwkv_es.task import Done, Problem
from rwkv_es.task.prompts import Prompting, prompt_of
from rwkv_es.task.task import load_task
from rwkv_es.task.tools import tool_loop

FILES = ROOT / "tests" / "data" / "environments"


def call(name, **given):
    return f" <tool_call>{json.dumps({'name': name, 'arguments': given})}</tool_call>"


def play(task, problem, answers):
    """What is said to each answer: texts, and the rewards' sum when it is over."""
    game = Game(task.environment, problem, 10_000)
    said = [game.answer(answer) for answer in answers]
    assert not any(each.error for each in said), said
    return [each.text for each in said], sum(each.reward for each in said), said[-1].is_over


def test_a_multi_turn_environment_of_verifiers():
    task = load_task("verifiers", str(FILES / "verifiers_sum.py"))
    problem = task.problems("train")[9]  # 2 + 2
    assert prompt_of(task, problem, Prompting()) == "System: Answer with a number.\n\nUser: 2 + 2\n\nAssistant:"
    assert play(task, problem, [" 4"]) == ([""], 1 + 0.5 * 0.75, True)
    assert play(task, problem, [" 5", " 4"]) == (["Wrong, hint 1.", ""], 1 + 0.5 * 0.5, True)
    assert play(task, problem, [" 5", " 6", " 7"]) == (["Wrong, hint 1.", "Wrong, hint 2.", ""], 0.5 * 0.25, True)
    assert [len(task.problems(split)) for split in ("train", "test")] == [64, 9]


def test_a_single_turn_environment_of_verifiers():
    task = load_task("verifiers", str(FILES / "verifiers_single.py"))
    assert [len(task.problems(split)) for split in ("train", "test")] == [2, 1]
    first = task.problems("train")[0]
    assert prompt_of(task, first, Prompting()) == "System: Be brief.\n\nUser: 1+1=\n\nAssistant:"
    assert play(task, first, [" It is 2"]) == ([""], 2.0, True)
    assert play(task, task.problems("test")[0], ["7"]) == ([""], 0.0, True)


def test_a_verifiers_environment_by_its_modules_name(monkeypatch):
    monkeypatch.syspath_prepend(str(FILES))
    assert len(load_task("verifiers:verifiers-single").problems("train")) == 2
    with pytest.raises(TaskError, match="no such module"):
        load_task("verifiers:nothing-of-the-sort").problems("train")


def test_an_environment_of_trls_form():
    task = load_task("trl_environment", str(FILES / "trl_counter.py"))
    problem = next(found for found in task.problems("train") if found.meta["row"]["goal"] == 7)
    prompt = prompt_of(task, problem, Prompting())
    assert prompt.startswith("User: Bring the counter to 7. The counter is at 2.\nYou may call tools")
    assert "- increment(amount: int) -> int: Increment the counter." in prompt and "_hidden" not in prompt
    answers = [call("increment", amount=4), call("value"), call("increment", amount=1), " Done."]
    texts, reward, is_over = play(task, problem, answers)
    assert texts[:3] == [f"<tool_response>{value}</tool_response>" for value in (6, 6, 7)]
    assert (reward, is_over) == (1.0, True)  # seven messages are not short: that function does not apply
    assert play(task, problem, [call("increment", amount=5), " Done."])[1] == 1.25
    assert play(task, problem, [" I cannot."])[1] == 0.25


def test_environments_of_several_kinds_that_pay_by_themselves():
    task = load_task("trl_environment", str(FILES / "trl_kinds.py"))
    adder, asker = task.problems("train")
    text = prompt_of(task, adder, Prompting())
    assert "Add. Reach 3." in text and "- add(amount: int)" in text and "get_reward" not in text
    assert play(task, adder, [call("add", amount=3), " Done."])[1] == 1.0 + 10.0 * 0.001
    assert prompt_of(task, asker, Prompting()).startswith("User: Ask.")
    assert play(task, asker, [call("ask")] * 2 + ["x"])[0][:2] == [
        f"<tool_response>{{'called': {n}}}</tool_response>" for n in (1, 2)
    ]


@pytest.mark.parametrize(
    ("name", "file", "answers", "reward"),
    [
        ("trl_environment", "trl_counter.py", [call("increment", amount=-2)], 1.25),  # the goal is 0, and it is short
        ("trl_environment", "trl_kinds.py", [call("add", amount=3)], 1.01),
        ("verifiers", "verifiers_sum.py", [" 5", " 6"], 0.25),  # one answer more would be the last
    ],
)
def test_an_episode_that_a_limit_ends_earns_what_its_transcript_is_worth(name, file, answers, reward):
    task = load_task(name, str(FILES / file))
    game = Game(task.environment, task.problems("train")[0], 10_000)
    assert not any(game.answer(answer).is_over for answer in answers)
    assert game.cut()[1:4] == (reward, True, "")


def test_a_tool_call_that_is_wrong_is_told_to_the_model():
    task = load_task("trl_environment", str(FILES / "trl_counter.py"))
    for wrong in (call("_hidden"), call("reset"), call("increment", x=1), "<tool_call>{</tool_call>", call("no")):
        (text,), _, is_over = play(task, task.problems("train")[0], [wrong])
        assert text.startswith("<tool_response>error: ") and not is_over


@pytest.mark.parametrize("name, file", [("verifiers", "verifiers_sum.py"), ("trl_environment", "trl_counter.py")])
def test_they_train_two_steps(name, file, tmp_path):
    """With the vocabulary of bytes, since the embedded model's has no letters."""
    options = {
        "model": byte_model(tmp_path),
        "task": name,
        "data": FILES / file,
        "population": 4,
        "prompts": 2,
        "steps": 2,
    }
    options |= {
        "max_new_tokens": 6,
        "temperature": 1,
        "eval_every": 2,
        "eval_size": 2,
        "reward_workers": 1,
        "max_turns": 3,
    }
    assert main(arguments(tmp_path / "run", **options)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward_errors"] for row in rows if "reward_errors" in row] == [0, 0]
    assert any(row.get("turns_per_episode", 0) >= 1 for row in rows)


def test_a_loop_of_tools():
    def shout(text):
        return text.upper()

    environment = tool_loop({"shout": shout, "count": len}, lambda problem, text: float(problem.answer in text))
    game = Game(environment, Problem("", "yes"), 1000)
    assert game.answer("<shout>a</shout> and <count>abc</count>").text == "<result>A</result>\n<result>3</result>"
    assert game.answer("<shout>never closed").reward == 0.0
    assert Game(environment, Problem("", "yes"), 1000).answer("yes")[1:3] == (1.0, True)


def test_a_tool_that_throws_is_told_to_the_model():
    def broken(text):
        raise ValueError("no\nsuch thing")

    game = Game(tool_loop({"a": broken}, lambda problem, text: 1.0), Problem("", ""), 1000)
    assert game.answer("<a>1</a>").text == "<result>error: no such thing</result>"


@pytest.mark.parametrize(
    "text, result",
    [
        ("12 * 34", "408"),
        ("7/2", "7/2"),
        ("-3 - 4", "-7"),
        ("1/0", "error"),
        ("1+1+1", "error"),
        ("9**9", "error"),
        ("", "error"),
    ],
)
def test_the_calculator(text, result):
    task = load_task("calculator")
    said = Game(task.environment, task.problems("train")[0], 1000).answer(f"<calc>{text}</calc>").text
    assert said.startswith(f"<result>{result}")


def test_guessing_takes_at_most_twenty_questions_by_halving():
    task = load_task("guess")
    counts = [len(problem.answer.splitlines()) for problem in task.problems("train")[:200]]
    assert 17 < sum(counts) / 200 < 20 and max(counts) <= 20
    problem = load_task("guess:1000").problems("train")[0]
    assert play(task, problem, ["I do not know", "My guess: 1,0", "7 or 1000"])[0] == [
        "Answer with a number.",
        "Higher.",
        "Lower.",
    ]


def test_a_closed_way_in_a_maze_changes_nothing():
    task = load_task("maze:4")
    problem = task.problems("train")[0]
    ways = problem.answer.splitlines()
    texts, reward, is_over = play(task, problem, ["", "north", "I go west", *ways])
    assert all(text.startswith("That way is closed.") for text in texts[:3]) and (reward, is_over) == (1.0, True)


@pytest.mark.skipif(
    "not __import__('importlib').util.find_spec('reasoning_gym')", reason="reasoning_gym is not installed"
)
def test_reasoning_gym_asks_again(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "RWKV_ES_CACHE", str(tmp_path))
    task = load_task("reasoning_again:chain_sum", '{"size": 3}')
    problem = task.problems("train")[0]
    assert play(task, problem, ["<answer>x</answer>", problem.answer])[1] == 0.5
    assert [said.reward for _, said in played(task.environment, problem)] == [1.0]
    assert isinstance(Done(1.0), tuple)
