import json
import sys

import pytest
from places import DATA
from timing import cpu_seconds

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Problem, load_task

COUNTDOWN = load_task("countdown")


def score(text: str, numbers, target) -> float:
    return COUNTDOWN.reward(Problem("", "", {"numbers": numbers, "target": target}), text)


def is_solution(expression: str, numbers, target) -> bool:
    return score(f"<answer>{expression}</answer>", numbers, target) == 1.0


def test_every_case_of_the_shared_file_scores_as_it_says():
    file = DATA / "countdown_cases.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not there; set RWKV_ES_DATA to the folder that holds it")
    cases = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
    wrong = [c["id"] for c in cases if score(c["completion"], c["numbers"], c["target"]) != c["reward"]]
    assert len(cases) > 40 and wrong == []


@pytest.mark.parametrize(
    ("expression", "numbers", "target"),
    [
        ("63-95+96", [63, 95, 96], 64),
        ("2+3*4", [2, 3, 4], 14),
        ("(2+3)*4", [2, 3, 4], 20),
        ("24/4/3", [3, 4, 24], 2),
        ("24/(4/3)", [3, 4, 24], 18),
        ("8/(3-8/3)", [3, 3, 8, 8], 24),  # exact only in fractions
        ("-2*-3", [2, 3], 6),
        ("+7 - -8", [7, 8], 15),
        ("0*5+7", [0, 5, 7], 7),
        ("\n7 \t*\r\n8 ", [7, 8], 56),
        ("1/3*3", [1, 3, 3], 1),
    ],
)
def test_solutions_are_paid_in_full(expression, numbers, target):
    assert is_solution(expression, numbers, target)


@pytest.mark.parametrize(
    ("expression", "numbers", "target"),
    [
        ("2+3*4", [2, 3, 4], 20),
        ("24/4/3", [3, 4, 24], 18),
        ("1+2", [1, 2, 3], 3),
        ("1+2+2", [1, 2], 5),
        ("12", [1, 2], 12),
        ("1 2", [1, 2], 12),
        ("100000/3", [100000, 3], 33333),
        ("7/0", [7, 0], 0),
        ("7/(8-8)+1", [1, 7, 8, 8], 1),
        ("", [], 0),
        ("()", [], 0),
        ("(7 8", [7, 8], 7),
        ("(7(8))", [7, 8], 7),
        ("()7", [7], 7),
        ("7)(", [7], 7),
        ("(7", [7], 7),
        ("7+", [7], 7),
        ("*7", [7], 7),
        ("7 8 *", [7, 8], 56),
        ("2**3+4", [2, 3, 4], 12),
        ("7//2+3", [7, 2, 3], 6),
        ("1.5*2", [1, 5, 2], 3),
        ("7*8 # done", [7, 8], 56),
        ("7*8=56", [7, 8], 56),
        ("07*8", [7, 8], 56),
        ("0b111*8", [7, 8], 56),
        ("٧*٨", [7, 8], 56),
        ("７*８", [7, 8], 56),
        ("7²", [7], 49),
        ("7\u00a0*\u00a08", [7, 8], 56),
        ("7−8", [7, 8], -1),
        ("7*8\x00", [7, 8], 56),
        ("7*8\ud800", [7, 8], 56),
        ("nan", [7, 8], 56),
        ("inf", [7, 8], 56),
        ("__import__('os').system('touch PROOF')", [7, 8], 56),
        ("63**95**96", [63, 95, 96], 64),
        ("9**9**9**9", [9, 9, 9, 9], 9),
        ("99999999!", [99999999], 1),
        ("factorial(10**9)", [10, 9], 1),
        ("9" * 5000, [9], 9),
    ],
)
def test_everything_else_in_tags_is_paid_a_tenth_at_once_and_never_run(
    expression, numbers, target, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = f"<answer>{expression}</answer>"
    assert score(text, numbers, target) == 0.1
    assert cpu_seconds(lambda: score(text, numbers, target)) < 0.05
    assert list(tmp_path.iterdir()) == []


def test_an_expression_has_at_most_200_characters_and_nests_at_most_20_deep():
    assert is_solution("7" + " " * 198 + "+8", [7, 8], 15) is False
    assert is_solution("7" + " " * 197 + "+8", [7, 8], 15)
    for start, end in (("(", ")"), ("-", ""), ("+", "")):
        assert is_solution(start * 20 + "7" + end * 20, [7], 7)
        assert not is_solution(start * 21 + "7" + end * 21, [7], -7 if start == "-" else 7)
    assert is_solution("(7)+" * 40 + "7", [7] * 41, 287)  # length is not depth


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("7*8", 0.0),
        ("<answer>7*8", 0.0),
        ("7*8</answer>", 0.0),
        ("</answer>7*8<answer>", 0.0),
        ("<ANSWER>7*8</ANSWER>", 0.0),
        ("<answer></answer>", 0.1),
        ("<answer>7+8</answer><answer>7*8</answer>", 1.0),
        ("<answer>7*8</answer><answer>7+8</answer>", 0.1),
        ("<answer>7*8</answer><answer>7+8", 1.0),
        ("<answer><answer>7*8</answer></answer>", 0.1),
        ("<answer>7*8</answer></answer>", 1.0),
        (" <think>so</think> <answer>7*8</answer> done", 1.0),
    ],
)
def test_the_last_closed_answer_tag_counts(text, reward):
    assert score(text, [7, 8], 56) == reward


def test_generated_problems_keep_the_published_ranges():
    sizes = set()
    for problem in COUNTDOWN.problems("train")[:300]:
        numbers, target = problem.meta["numbers"], problem.meta["target"]
        sizes.add(len(numbers))
        assert all(1 <= number <= 99 for number in numbers) and 10 <= target <= 100
        assert f"target {target} with the numbers {list(numbers)}." in problem.prompt
        assert "<answer>" in problem.prompt
    assert sizes == {3, 4}


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_split_is_decided_by_the_problem_and_not_by_the_order_of_its_numbers(split):
    split_of = sys.modules[COUNTDOWN.reward.__module__].split_of
    for problem in COUNTDOWN.problems(split)[:200]:
        assert split_of(problem.meta["numbers"][::-1], problem.meta["target"]) == split


def test_generated_problems_stay_what_they_were_in_version_1():
    found = [(*problem.meta["numbers"], problem.meta["target"]) for problem in COUNTDOWN.problems("train")[:3]]
    assert found == [(38, 66, 33, 40), (59, 27, 18, 68), (41, 15, 15, 71)]  # else: a new VERSION


def test_own_data_is_read_and_a_wrong_solution_in_it_is_refused(tmp_path):
    row = {"question": "Make 56 of 7 and 8.", "answer": "7 * 8", "numbers": [7, 8], "target": 56}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    problem = load_task("countdown", str(tmp_path)).problems("train")[0]
    assert problem.prompt.startswith("Make 56 of 7 and 8. Return the final expression in <answer> </answer> tags")
    assert COUNTDOWN.reward(problem, problem.answer) == 1.0
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "target": 57}))
    with pytest.raises(Exception, match=r"test\.jsonl, line 2: the answer '7 \* 8' does not solve \[7, 8\] = 57"):
        load_task("countdown", str(tmp_path)).problems("test")


def test_the_shared_problems_are_all_read():
    folder = DATA / "countdown34"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set RWKV_ES_DATA to the folder that holds it")
    task = load_task("countdown", str(folder))
    assert (len(task.problems("train")), len(task.problems("test"))) == (4000, 1000)


@pytest.mark.parametrize(("argument", "sizes"), [("5", {5}), ("4-6", {4, 5, 6}), ("2-2", {2})])
def test_harder_problems_have_as_many_numbers_as_the_argument_says(argument, sizes):
    task = load_task(f"countdown:{argument}")
    for split in ("train", "test"):
        problems = task.problems(split)[:60]
        assert {len(problem.meta["numbers"]) for problem in problems} == sizes
        for problem in problems:
            assert task.reward(problem, problem.answer) == 1.0
            assert (
                sys.modules[task.reward.__module__].split_of(problem.meta["numbers"], problem.meta["target"]) == split
            )
    assert task.problems("test")[0] == load_task(f"countdown:{argument}").problems("test")[0]


@pytest.mark.parametrize("argument", ["1", "9", "x", "5-3", "3-9", "3-4-5", "55"])
def test_an_argument_that_is_no_number_of_numbers_is_refused(argument):
    with pytest.raises(TaskError, match=r"countdown:N takes 2 to 8 numbers"):
        load_task(f"countdown:{argument}").problems("test")


def test_an_argument_and_data_do_not_go_together():
    with pytest.raises(TaskError, match=r"leave out the number or the data x\.jsonl"):
        load_task("countdown:5", "x.jsonl").problems("test")
