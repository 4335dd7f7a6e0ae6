"""Examples before a question, system texts of rows, and where answers end."""

import pytest

from rwkv_es.system.errors import ConfigError
from rwkv_es.task import SYSTEM, Problem, Task
from rwkv_es.task.prompts import Prompting, prompt_of, response_prefix_of, stops_of, template_of

PROBLEMS = [Problem(f"{i}?", f"is {i}") for i in range(4)]


def task(template="chat", problems=PROBLEMS):
    return Task("t", lambda split: problems if split == "train" else [], lambda p, t: 1.0, "1", ("\nS",), 8, template)


def test_a_problem_is_asked_in_its_tasks_template_unless_another_is_named():
    assert prompt_of(task(), PROBLEMS[0], Prompting()) == "User: 0?\n\nAssistant:"
    assert prompt_of(task(), PROBLEMS[0], Prompting("raw")) == "0?"
    assert (
        template_of(task(), Prompting("think")) == "think"
        and response_prefix_of(task(), Prompting("think")) == " <think"
    )


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("chat", "User: 0?\n\nAssistant: is 0\n\nUser: 1?\n\nAssistant: is 1\n\nUser: 3?\n\nAssistant:"),
        ("think", "User: 0?\n\nAssistant: is 0\n\nUser: 1?\n\nAssistant: is 1\n\nUser: 3?\n\nAssistant: <think"),
        ("flower", "User✿0?✿\nBot✿is 0✿\nUser✿1?✿\nBot✿is 1✿\nUser✿3?✿\nBot✿<think"),
        ("raw", "0?is 0\n\n1?is 1\n\n3?"),
    ],
)
def test_solved_training_problems_come_first(template, prompt):
    assert prompt_of(task(template), PROBLEMS[3], Prompting(shots="2")) == prompt


def test_nobody_is_shown_his_own_answer():
    prompt = prompt_of(task("raw"), PROBLEMS[1], Prompting(shots="2"))
    assert prompt == "0?is 0\n\n2?is 2\n\n1?"


def test_the_system_text_stands_before_the_examples():
    prompt = prompt_of(task(), PROBLEMS[3], Prompting(system="Brief.", shots="1"))
    assert prompt == "System: Brief.\n\nUser: 0?\n\nAssistant: is 0\n\nUser: 3?\n\nAssistant:"
    own = Problem("3?", "", {SYSTEM: "Long.", "system_of_prompt": "a column", "system": "a column"})
    assert prompt_of(task(), own, Prompting("system", "Brief.")) == "System: Long.\n\nUser: 3?\n\nAssistant:"


def test_examples_may_be_a_file(tmp_path):
    (tmp_path / "shots.txt").write_text("Q: a\nA: b\n")
    assert prompt_of(task("raw"), PROBLEMS[0], Prompting(shots=str(tmp_path / "shots.txt"))) == "Q: a\nA: b\n\n0?"


def test_too_many_examples_or_an_unreadable_file_are_refused():
    with pytest.raises(ConfigError, match="shots is 4, but task t has only 3 other"):
        prompt_of(task(), PROBLEMS[0], Prompting(shots="4"))
    with pytest.raises(ConfigError, match=r"a number or a text file: none\.txt cannot be read"):
        prompt_of(task(), PROBLEMS[0], Prompting(shots="none.txt"))


def test_an_answer_ends_at_the_tasks_strings_and_the_templates():
    assert stops_of(task(), Prompting()) == ("\nS",)
    assert stops_of(task(), Prompting("flower")) == ("\nS", "✿")
