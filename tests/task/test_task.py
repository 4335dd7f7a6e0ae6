import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rwkv_es
from rwkv_es.system.errors import ConfigError, TaskError
from rwkv_es.task.datasets import read_problems
from rwkv_es.task.task import Generated, Problem, list_tasks, load_task
from rwkv_es.task.templates import TEMPLATES, render, response_prefix

REPO = Path(rwkv_es.__file__).parent.parent
CONSTANTS = 'VERSION = "1"\nSTOP = ("\\n",)\nMAX_NEW_TOKENS = 8\nTEMPLATE = "chat"\n'
FUNCTIONS = """
from rwkv_es.task import Problem
def problems(split, data=""):
    return [Problem(f"{split} {data}", "x")]
def reward(problem, text):
    return float(text == problem.answer)
"""
WHOLE = CONSTANTS + FUNCTIONS


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


# Written out from the model's own prompt formats, not from TEMPLATES.
@pytest.mark.parametrize(
    ("template", "prompt", "start"),
    [
        ("chat", "User: 1+1?\n\nAssistant:", ""),
        ("think", "User: 1+1?\n\nAssistant: <think", " <think"),
        ("short_think", "User: 1+1?\n\nAssistant: <think>\n</think", " <think>\n</think"),
        (
            "assistant_think",
            "User: You are a helpful assistant. You first think about the reasoning process in your mind and then provide "
            "the user with the answer. Question: 1+1?. Assistant: <think",
            " <think",
        ),
        ("flower", "User✿1+1?✿\nBot✿<think", "<think"),
        ("raw", "1+1?", ""),
    ],
)
def test_a_template_gives_the_published_prompt_and_the_start_that_is_scored(template, prompt, start):
    assert render(template, "1+1?") == prompt
    assert response_prefix(template) == start


def test_every_template_is_covered_above():
    assert set(TEMPLATES) == {"chat", "think", "short_think", "system", "assistant_think", "flower", "raw"}


@pytest.mark.parametrize(
    ("template", "rest"),
    [
        ("system", "User: 1+1?\n\nAssistant:"),
        ("chat", "User: 1+1?\n\nAssistant:"),
        ("think", "User: 1+1?\n\nAssistant: <think"),
        ("short_think", "User: 1+1?\n\nAssistant: <think>\n</think"),
    ],
)
def test_a_system_text_goes_before_the_first_turn(template, rest):
    assert render(template, "1+1?", "Be\n\n\nbrief. {q}\n") == "System: Be\nbrief. {q}\n\n" + rest


def test_a_system_text_without_a_place_or_a_template_without_its_text_is_refused():
    for template in ("raw", "flower", "assistant_think"):
        with pytest.raises(ConfigError, match=f"{template} has no place for a system text"):
            render(template, "x", "Be brief.")
    with pytest.raises(ConfigError, match="needs a text: --system TEXT"):
        render("system", "x")


def test_blank_lines_in_a_question_are_closed_up_except_in_raw():
    assert render("chat", "\n a\n\n\nb\nc {q} {} \n\n") == "User: a\nb\nc {q} {}\n\nAssistant:"
    assert render("raw", "\n a\n\n\nb ") == "\n a\n\n\nb "


@pytest.mark.parametrize("function", [response_prefix, lambda name: render(name, "x")])
def test_an_unknown_template_is_refused_with_the_choices(function):
    with pytest.raises(ConfigError, match=r"'chatt'.*chat, think, short_think, system, assistant_think, flower, raw"):
        function("chatt")


def test_built_in_tasks_are_listed_with_what_they_are():
    tasks = list_tasks()
    assert {"countdown", "copy", "gsm8k"} <= set(tasks)
    assert all(tasks.values())
    assert tasks["copy"] == "Copy: repeat four digits. The smallest task, for first runs and for tests; needs no data."


def test_a_built_in_task_is_loaded_with_its_constants():
    task = load_task("copy")
    assert (task.name, task.version, task.stop, task.max_new_tokens, task.template) == ("copy", "1", ("\n",), 12, "raw")
    assert task.reward(Problem("1 2:", "1 2"), "1 2") == 1.0


def test_the_own_task_may_be_a_folder_or_a_file_and_gets_the_data_path(tmp_path):
    folder = write(tmp_path / "mine", task=WHOLE)
    file = write(tmp_path, other=WHOLE) / "other.py"
    for path, name in ((folder, "mine"), (folder / "task.py", "mine"), (file, "other")):
        task = load_task(str(path), "here.jsonl")
        assert task.name == name
        assert task.problems("train") == [Problem("train here.jsonl", "x")]


def test_an_own_task_can_import_its_neighbours_relatively(tmp_path):
    folder = write(
        tmp_path / "mine", task=WHOLE + "from .scorer import reward\n", scorer="def reward(p, t): return 0.25\n"
    )
    assert load_task(str(folder)).reward(Problem("", ""), "") == 0.25


def test_what_follows_a_colon_is_the_tasks_argument(tmp_path):
    text = (
        WHOLE
        + "def problems(split, data='', argument='none'):\n    return [Problem(f'{split} {data} {argument}', 'x')]\n"
    )
    folder = write(tmp_path / "mine", task=text + "STOP_INCLUDED = ('.',)\nTIMEOUT_S = 2\n")
    for path, argument in ((folder, "none"), (f"{folder}:5", "5"), (f"{folder}/task.py:a,b", "a,b")):
        assert load_task(str(path), "d").problems("test") == [Problem(f"test d {argument}", "x")]
    task = load_task(f"{folder}:5")
    assert (task.name, task.stop_included, task.timeout_s) == ("mine:5", (".",), 2.0)
    with pytest.raises(TaskError, match="copy takes no argument; got '5'"):
        load_task("copy:5")


def test_two_own_tasks_of_one_name_are_kept_apart(tmp_path):
    first, second = (write(tmp_path / side / "mine", task=WHOLE + f"VERSION = {side!r}\n") for side in "ab")
    assert [load_task(str(path)).version for path in (first, second)] == ["a", "b"]


def test_a_relative_path_needs_a_dot_or_slash_and_the_message_says_so(tmp_path, monkeypatch):
    write(tmp_path / "mine", task=WHOLE)
    monkeypatch.chdir(tmp_path)
    assert load_task("./mine").name == "mine"
    with pytest.raises(TaskError, match=r"unknown task 'mine'.*\./mine"):
        load_task("mine")


def test_a_mistyped_name_gets_the_nearest_one():
    with pytest.raises(TaskError, match="'gsm8'; did you mean gsm8k"):
        load_task("gsm8")
    with pytest.raises(TaskError, match=r"'zzz'; built-in tasks: aime, arithmetic_mini, calculator, copy, countdown"):
        load_task("zzz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FUNCTIONS, "does not define VERSION"),
        (CONSTANTS, "does not define problems"),
        (WHOLE + "del reward", "does not define reward"),
        (WHOLE + "reward = 3", "must be functions"),
        (WHOLE + "VERSION = 1", 'VERSION .* like "1"; got 1'),
        (WHOLE + "STOP = 'x'", "STOP .* tuple of strings.*got 'x'"),
        (WHOLE + "STOP = ('',)", "STOP .* none of them empty"),
        (WHOLE + "MAX_NEW_TOKENS = 0", "MAX_NEW_TOKENS .* from 1 to 1048576; got 0"),
        (WHOLE + "MAX_NEW_TOKENS = 2**20 + 1", "MAX_NEW_TOKENS .* from 1 to 1048576; got 1048577"),
        (WHOLE + "MAX_NEW_TOKENS = 2.5", "MAX_NEW_TOKENS .* from 1 to 1048576; got 2.5"),
        (WHOLE + "TEMPLATE = 'chatt'", "TEMPLATE .* one of chat, think.* got 'chatt'"),
        (WHOLE + "TEMPLATE = []", "TEMPLATE .* one of chat, think"),
        (WHOLE + "STOP_INCLUDED = 'x'", "STOP_INCLUDED .* tuple of strings.*got 'x'"),
        (WHOLE + "TIMEOUT_S = 0", "TIMEOUT_S .* above 0; got 0"),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def (", r"cannot be imported: SyntaxError: invalid syntax \(task.py, line 1: def \(\)"),
    ],
)
def test_a_broken_task_is_refused_in_one_sentence(tmp_path, text, message):
    folder = write(tmp_path / "mine", task=text)
    with pytest.raises(TaskError, match=message) as caught:
        load_task(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return []", "not an empty one"),
        ("return ['a question']", "a sequence of Problem"),
        ("return None", r"problems\('test'\) of task .* failed: TypeError"),
        ("raise KeyError('question')", r"problems\('test'\) of task .* failed: KeyError: 'question'"),
    ],
)
def test_what_goes_wrong_in_problems_is_a_task_error(tmp_path, body, message):
    folder = write(tmp_path / "mine", task=f"{WHOLE}def problems(split, data=''):\n    {body}\n")
    with pytest.raises(TaskError, match=message):
        load_task(str(folder)).problems("test")


def test_a_path_without_a_task_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none", tmp_path / "none.py"):
        with pytest.raises(TaskError, match=r"give a folder with task\.py, or a \.py file"):
            load_task(str(path))
    (tmp_path / "task.txt").write_text(WHOLE)
    with pytest.raises(TaskError, match=r"must end in \.py"):
        load_task(str(tmp_path / "task.txt"))


def test_an_unknown_split_is_refused():
    with pytest.raises(TaskError, match="unknown split 'dev'; it is train or test"):
        load_task("copy").problems("dev")


def test_problems_of_a_split_are_read_once(tmp_path):
    folder = write(tmp_path / "mine", task=WHOLE)
    task = load_task(str(folder))
    assert task.problems("train") is task.problems("train")


def test_generated_problems_are_made_by_index_and_slice():
    generated = Generated(lambda i: Problem(str(i), ""), 5)
    assert len(generated) == 5
    assert [p.prompt for p in generated] == ["0", "1", "2", "3", "4"]
    assert generated[-1].prompt == "4"
    assert [p.prompt for p in generated[3:]] == ["3", "4"]
    with pytest.raises(IndexError):
        generated[5]


def to_problem(row):
    if row["answer"] == "wrong":
        raise ValueError("the answer is wrong")
    return Problem(row["question"], row["answer"])


def read(data, split="train"):
    return read_problems(str(data), split, {"question": str, "answer": str}, to_problem)


def jsonl(*rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


GOOD = {"question": "a\u2028b\u0085c", "answer": "1", "id": "more fields are no harm"}


def test_rows_end_at_line_feeds_alone_and_files_may_be_compressed(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(jsonl(GOOD) + b"\n  \r\n" + jsonl(GOOD).replace(b"\n", b"\r\n"))
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(jsonl(GOOD).rstrip(b"\n")))
    assert read(tmp_path) == [Problem("a\u2028b\u0085c", "1")] * 2
    assert read(tmp_path, "test") == [Problem("a\u2028b\u0085c", "1")]
    assert read(tmp_path / "test.jsonl.gz", "train") == read(tmp_path, "test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2 is not JSON"),
        (b'"\xff"', "line 2 is not JSON"),
        (b"[1]", "line 2 must be a JSON object; got list"),
        (b'{"question": "a"}', "line 2 has no field 'answer'; it needs question, answer"),
        (b'{"question": "a", "answer": 1}', "line 2: field 'answer' must be str; got int"),
        (b'{"question": "a", "answer": "wrong"}', "line 2: the answer is wrong"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "some.jsonl"
    file.write_bytes(jsonl(GOOD) + line + b"\n" + jsonl(GOOD))
    with pytest.raises(TaskError, match=f"some.jsonl, {message}"):
        read(file)


def test_missing_or_empty_or_damaged_data_is_refused(tmp_path):
    with pytest.raises(TaskError, match="none does not exist"):
        read(tmp_path / "none")
    with pytest.raises(TaskError, match=r"none of train\.jsonl, train\.jsonl\.gz, train\.parquet"):
        read(tmp_path)
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    with pytest.raises(TaskError, match="holds no problems"):
        read(tmp_path / "empty.jsonl")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(jsonl(*[GOOD] * 99))[:40])
    with pytest.raises(TaskError, match=r"cut\.gz cannot be read"):
        read(tmp_path / "cut.gz")


def test_built_in_tasks_load_from_inside_an_installed_package_without_torch(tmp_path):
    package = tmp_path / "rwkv_es"
    shutil.copytree(REPO / "rwkv_es", package, ignore=shutil.ignore_patterns("tiny", "__pycache__"))
    shutil.copytree(Path(sys.modules[load_task("copy").reward.__module__].__file__).parent.parent, package / "tasks")
    relative = package / "tasks" / "sibling"
    write(relative, task="from ..copy.task import *\nVERSION = 'by relative import'\n")
    code = (
        "import sys; from rwkv_es.task import load_task; import rwkv_es.reward.pool; task = load_task('sibling');"
        "print(sys.modules[task.reward.__module__].__file__, task.version, 'torch' in sys.modules, sep='|')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == f"{package}/tasks/copy/task.py|by relative import|False"
