"""Several tasks as one: what is drawn, in which proportion, and whose reward it gets."""

from collections import Counter

import pytest

from rwkv_es.system.errors import TaskError
from rwkv_es.task.mixture import Mixed, draw, load_tasks, overlap, parse, whole_weights
from rwkv_es.task.task import PART, Generated, Problem


def numbered(name, count):
    return [Problem(f"{name}{i}", "") for i in range(count)]


def mixed(weights=(1, 2, 1), sizes=(3, 10, 4)):
    return Mixed([numbered(name, size) for name, size in zip("abc", sizes)], weights)


def test_every_cycle_holds_each_part_as_often_as_its_weight_says():
    problems = mixed()
    drawn = [draw(problems, 0, position).prompt for position in range(40)]
    for start in range(0, 40, 4):
        assert Counter(prompt[0] for prompt in drawn[start : start + 4]) == {"a": 1, "b": 2, "c": 1}
    assert drawn[:4] != drawn[4:8], "cycles are shuffled"


def test_each_part_comes_in_shuffled_passes_without_repetition():
    drawn = [draw(mixed(), 0, position).prompt for position in range(60)]
    of_b = [prompt for prompt in drawn if prompt[0] == "b"]
    assert sorted(of_b[:10]) == sorted(of_b[10:20]) == sorted(p.prompt for p in numbered("b", 10))
    assert of_b[:10] != of_b[10:20]
    assert len(set([prompt for prompt in drawn if prompt[0] == "a"][:3])) == 3


def test_what_is_drawn_depends_on_seed_and_position_alone():
    forward = [draw(mixed(), 7, position).prompt for position in range(20)]
    assert [draw(mixed(), 7, position).prompt for position in reversed(range(20))] == forward[::-1]
    other = [draw(mixed(), 8, position).prompt for position in range(20)]
    assert other != forward and [prompt[0] for prompt in other] != [prompt[0] for prompt in forward]


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ([1, 2, 1], [1, 2, 1]),
        ([2, 4], [1, 2]),
        ([0.3, 0.7], [3, 7]),
        ([1.5, 1.5], [1, 1]),
        ([1, 99], [1, 99]),
        ([5], [1]),
    ],
)
def test_weights_become_whole_numbers(weights, whole):
    assert whole_weights(weights) == whole


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ((1, 1500), [1, 1500]),
        ((0.002, 0.998), [1, 499]),
        ((0.3, 99.7), [3, 997]),
        ((0.333, 0.667), [333, 667]),
        ((0.1, 0.2, 0.7), [1, 2, 7]),
        ((1e-3, 2.5), [1, 2500]),
        ((1, 99_999), [1, 99_999]),
    ],
)
def test_weights_are_exact(weights, whole):
    assert whole_weights(weights) == whole


@pytest.mark.parametrize(
    "weights",
    [
        "copy=1,countdown=100000",
        "copy=1e-9,countdown=1",
        "copy=1e308,countdown=1e-308",
        "copy=0.3333333,countdown=0.6666667",
    ],
)
def test_weights_too_far_apart_are_refused(weights):
    with pytest.raises(TaskError, match="at most 100000 are allowed"):
        load_tasks(weights)


def test_as_a_list_every_problem_is_there_once_in_about_the_proportion_of_the_weights():
    problems = mixed((1, 3), (10, 30))
    assert len(problems) == 40 and len({p.prompt for p in problems}) == 40
    assert Counter(p.prompt[0] for p in problems[:12]) == {"a": 3, "b": 9}
    assert problems[3] == problems[:4][3] and problems[3].meta[PART] in (0, 1)


def test_a_part_keeps_its_template_limits_and_reward():
    task = load_tasks("copy=1,countdown=2")
    for problem in task.problems("train")[:12]:
        part = task.part_of(problem)
        assert part.name == ("copy" if problem.prompt[0].isdigit() else "countdown")
        assert task.reward(problem, problem.answer) == part.reward(problem, problem.answer) == 1.0
        assert task.reward(problem, "<answer>1</answer>") == (0.1 if part.name == "countdown" else 0.0)
    assert [part.max_new_tokens for part in task.parts] == [12, 1000]


@pytest.mark.parametrize("spec", ["copy", "./mine/task.py", "countdown:5"])
def test_one_task_alone_is_no_mixture(spec):
    assert parse(spec) is None


def test_a_path_that_exists_is_no_mixture(tmp_path):
    (tmp_path / "a=1,b").mkdir()
    assert parse(str(tmp_path / "a=1,b")) is None


def test_weights_may_be_left_out_and_arguments_stay():
    assert parse("a, b:x=2 ,./c=d/task.py=0.5") == [("a", 1.0), ("b:x", 2.0), ("./c=d/task.py", 0.5)]


@pytest.mark.parametrize(
    ("spec", "data", "message"),
    [
        ("copy=0,countdown=1", "", "weight of a task must be a number above 0.*'copy=0'"),
        ("copy=x,countdown=1", "", "'copy=x'"),
        ("copy=1,copy=2", "", "each task once"),
        ("copy=1,", "", "each task once"),
        ("copy=1,nothing=1", "", "unknown task 'nothing'"),
        ("copy=1,countdown=1", "file.jsonl", "task=PATH,task=PATH, of copy, countdown; got 'file.jsonl'"),
        ("copy=1,countdown=1", "gsm8k=file", "got 'gsm8k'"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_said(spec, data, message):
    with pytest.raises(TaskError, match=message):
        load_tasks(spec, data)


def test_data_goes_to_the_part_it_is_for(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"question": "{name}", "answer": "1"}}\n')
    task = load_tasks("jsonl=1,svamp=1", f"svamp={tmp_path}/a.jsonl, jsonl={tmp_path}/b.jsonl")
    assert [(task.part_of(p).name, p.prompt) for p in task.problems("test")] == [("jsonl", "b"), ("svamp", "a")]


def test_problems_of_both_splits_are_counted():
    assert overlap(numbered("a", 5), numbered("a", 3)) == 3
    assert overlap(numbered("a", 5), numbered("b", 3)) == 0
    assert overlap(Generated(lambda i: Problem(f"a{i}", ""), 5), numbered("a", 3)) == 0
    assert overlap(mixed(), mixed(sizes=(1, 1, 0))) == 2


@pytest.mark.parametrize("spec", ["copy" * 100 + "=1", "x" * 5000, "\0=1", ",".join(f"copy{i}=1" for i in range(100))])
def test_specs_longer_than_a_file_name_are_refused_like_others(spec):
    with pytest.raises(TaskError, match="unknown task"):
        load_tasks(spec)
