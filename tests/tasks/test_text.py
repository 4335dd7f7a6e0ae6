"""Any text in pieces."""

import pytest

from rwkv_es.system.errors import TaskError
from rwkv_es.task.mixture import overlap
from rwkv_es.task.task import load_task

LINES = [f"line {i} of a text\n" for i in range(400)]


def pieces_of(name, data, split):
    return [problem.answer for problem in load_task(name, str(data)).problems(split)]


def test_nothing_is_lost_and_about_a_tenth_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("".join(LINES))
    train, test = (pieces_of("text:40", tmp_path / "a.txt", split) for split in ("train", "test"))
    assert sorted("".join(train + test).splitlines(True)) == sorted(LINES)
    assert 0.05 < len(test) / len(train + test) < 0.17
    assert all(piece.endswith("\n") and 20 < len(piece) <= 40 for piece in train + test)


def test_pieces_end_at_blanks_where_there_is_no_line_and_anywhere_where_there_is_none(tmp_path):
    (tmp_path / "train.txt").write_text("aaaa bbbb cccccccccccc")
    assert pieces_of("text:8", tmp_path, "train") == ["aaaa ", "bbbb ", "cccccccc", "cccc"]


def test_a_folder_says_what_is_held_out(tmp_path):
    (tmp_path / "train.txt").write_text("one")
    (tmp_path / "test.txt").write_text("two")
    task = load_task("text", str(tmp_path))
    assert [task.problems(split)[0].answer for split in ("train", "test")] == ["one", "two"]
    assert overlap(task.problems("train"), task.problems("test")) == 0
    assert overlap(task.problems("train"), task.problems("train")) == 1


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("text:0", "x", "up to N characters"),
        ("text", "x", "has no pieces for test; cut smaller ones"),
        ("text", None, "cannot be read"),
    ],
)
def test_what_cannot_be_cut_is_said(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / "a.txt").write_text(text)
    with pytest.raises(TaskError, match=words):
        load_task(name, str(tmp_path / "a.txt")).problems("test")


def test_what_is_wrong_with_a_file_is_said_in_words_alone(tmp_path):
    with pytest.raises(TaskError) as error:
        load_task("text", str(tmp_path / "none.txt")).problems("train")
    assert str(error.value) == f"text {tmp_path}/none.txt cannot be read (No such file or directory)"
    (tmp_path / "train.txt").write_bytes(b"\xff\xfea")
    with pytest.raises(TaskError) as error:
        load_task("text", str(tmp_path)).problems("train")
    assert str(error.value) == f"text {tmp_path}/train.txt is UTF-16; save it as UTF-8"
    (tmp_path / "train.txt").write_bytes(b"one\ntwo\nth\xffree\n")
    with pytest.raises(TaskError) as error:
        load_task("text", str(tmp_path)).problems("train")
    assert str(error.value) == f"text {tmp_path}/train.txt is no UTF-8 (byte 0xff in line 3); save it so"


def test_problems_that_may_not_be_trained_on_are_refused(tmp_path):
    (tmp_path / "train.txt").write_text("a line of text\n" * 2 + "AIME 2024 Problem 3")
    with pytest.raises(TaskError, match=r"train.txt, line 3 .*held out for evaluation"):
        load_task("text:20", str(tmp_path)).problems("train")
