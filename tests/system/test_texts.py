"""Texts and paths as people hand them over: one reader, one `~`, and messages that stay short."""

import os

import pytest
import yaml

from rwkv_es.cli import main
from rwkv_es.config.file import load_file, parse_yaml
from rwkv_es.config.options import FIELDS, build
from rwkv_es.system.errors import ConfigError
from rwkv_es.system.texts import all_expanded, expanded, read_text, shown
from rwkv_es.task.templates import render, unix_lines

MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_dropped_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(MARK + "ä\r\n\ufeffb ".encode())
    assert read_text(path, "text") == "ä\r\n\ufeffb "


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("ä".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("ä".encode("latin-1"), "is no UTF-8 \\(byte 0xe4 in line 1\\)"),
        (b"x" * 101, "larger than 100 bytes"),
        (None, "cannot be read \\(No such file"),
    ],
)
def test_what_is_no_text_is_one_sentence(tmp_path, data, words):
    if data is not None:
        (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ConfigError, match=words) as error:
        read_text(tmp_path / "a.txt", "text", 100)
    assert "\n" not in str(error.value)


def test_pipes_devices_and_folders_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in (
        (tmp_path / "pipe", "a pipe or device"),
        ("/dev/zero", "a pipe or device"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(ConfigError, match=f"is {kind}"):
            read_text(path, "text")


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_a_file_of_options_may_begin_with_a_mark(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(MARK + (b"steps: 3\nshots: 2\n" if suffix == "yaml" else b"steps = 3\nshots = 2\n"))
    assert build(load_file(str(path))).steps == 3 and build(load_file(str(path))).shots == "2"


def test_home_is_meant_by_a_tilde_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/x") == "/home/me/x" and expanded("~") == "/home/me" and expanded("a/~/x") == "a/~/x"
    assert all_expanded("jsonl=~/a.jsonl,~/b.py:f=0.5,c~d") == "jsonl=/home/me/a.jsonl,/home/me/b.py:f=0.5,c~d"
    paths = {name for name, f in FIELDS.items() if f.metadata["paths"]}
    assert paths == {
        "model",
        "tokenizer",
        "state",
        "task",
        "data",
        "shots",
        "reward",
        "base",
        "text",
        "run",
        "out",
        "eval_sets",
    }
    for name in paths:
        verb = FIELDS[name].metadata["verbs"][0]
        assert getattr(build({name: "~/x"}, verb), name) == "/home/me/x"
    assert build({"system": "~/x"}).system == "~/x", "a text stays as it is"


@pytest.mark.parametrize("argument", ["~/no.pth", "--model=~/no.pth"])
def test_positional_values_are_paths_too(argument, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    assert main(["eval", argument]) == 2
    assert "/home/me/no.pth" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["~nobody_of_this_name/x", "a=~nobody_of_this_name/x"])
def test_a_home_that_is_not_there_is_one_sentence(path):
    with pytest.raises(ConfigError, match="there is no home folder '~nobody_of_this_name'"):
        build({"task": path})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("lr: 1\nlr: 2\n", "lr stands twice"),
        ("a: " + "[" * 3000, "nested too deep|while parsing"),
        ("a: {b: 1", "while parsing"),
    ],
)
def test_yaml_that_is_no_list_of_options_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)
    assert yaml.safe_load("a: 1") == parse_yaml("a: 1")


def test_deep_toml_is_refused(tmp_path):
    for number, text in enumerate(("a" + ".a" * 20000 + " = 1", "a = " + "[" * 3000)):
        path = tmp_path / f"{number}.toml"
        path.write_text(text)
        with pytest.raises(ConfigError, match="cannot be parsed"):
            load_file(str(path))


@pytest.mark.parametrize(
    "make", [lambda: "x" * 10**6, lambda: 10**10000, lambda: [[1] * 10**5] * 10, lambda: {"a": "\ud800" * 999}]
)
def test_a_message_shows_no_more_than_a_line(make):
    value = make()
    assert len(shown(value)) < 400
    with pytest.raises(ConfigError) as error:
        build({"targets": value})
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("gap", ["\n\n", "\r\n\r\n", "\r\r", "\n \t\n", "\r\n  \r\n\r\n"])
def test_blank_lines_are_closed_up_however_lines_end(gap):
    assert render("chat", f"a{gap}b") == "User: a\nb\n\nAssistant:"
    assert unix_lines("a\r\nb\rc\n") == "a\nb\nc\n"
