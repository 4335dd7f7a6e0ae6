import json
import sys
from types import SimpleNamespace

import pytest
from places import DATA

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Problem, load_task


def test_every_problem_of_the_set_is_read_and_pays_its_answer():
    file = DATA / "svamp" / "test.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not there; set RWKV_ES_DATA to the folder that holds it")
    task = load_task("svamp", str(file))
    problems = task.problems("test")
    assert len(problems) == 1000
    for problem in problems:
        number = problem.meta["ground_truth"]
        assert task.reward(problem, f" <think>1</think>So it is {number}.") == 1.0
        assert task.reward(problem, f"It is {number}1") == 0.0


def test_a_row_of_the_hub_joins_story_and_question(monkeypatch):
    rows = [
        {"Body": "Tom has 3 apples", "Question": "How many?", "Answer": 3.0},
        {"Body": "Ann? ", "Question": "Q?", "Answer": "4"},
    ]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *args, split: rows))
    assert load_task("svamp").problems("test") == [
        Problem("Tom has 3 apples. How many?", "#### 3.0", {"ground_truth": "3.0"}),
        Problem("Ann? Q?", "#### 4", {"ground_truth": "4"}),
    ]


def test_an_answer_without_a_number_is_refused(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "q", "answer": "many"}))
    with pytest.raises(TaskError, match="no number in the answer 'many'"):
        load_task("svamp", str(tmp_path)).problems("test")
