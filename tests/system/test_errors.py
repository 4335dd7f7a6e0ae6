"""What a user's code raised, in one line."""

import pytest

from rwkv_es.system.errors import cause

CODE = """
import json

class Silent(Exception):
    def __str__(self):
        raise RuntimeError("no text")

def name():
    return missing

def inside_a_library():
    return json.loads("{")

def long():
    raise ValueError("x" * 10_000 + "\\n" + "y")

def two_lines():
    raise ValueError("first\\n\\nsecond")

def silent():
    raise Silent

def deep():
    return deep()

def assertion():
    assert 1 == 2

def parsed():
    compile("1 +", "formula", "eval")
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    file = tmp_path_factory.mktemp("users") / "mine.py"
    file.write_text(CODE)
    names: dict = {}
    exec(compile(CODE, str(file), "exec"), names)
    return names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("name", "NameError: name 'missing' is not defined (mine.py, line 9, in name: return missing)"),
        ("inside_a_library", '(mine.py, line 12, in inside_a_library: return json.loads("{"))'),
        ("two_lines", "ValueError: first second (mine.py, line 18"),
        ("silent", "(mine.py, line 21, in silent: raise Silent)"),
        ("deep", "RecursionError: maximum recursion depth exceeded"),
        ("assertion", "AssertionError (mine.py, line 27, in assertion: assert 1 == 2)"),
        ("parsed", "SyntaxError: invalid syntax (formula, line 1: 1 +) (mine.py, line 30, in parsed"),
    ],
)
def test_it_names_the_last_line_of_the_users_own(functions, name, said):
    with pytest.raises(Exception) as caught:
        functions[name]()
    assert said in cause(caught.value) and "\n" not in cause(caught.value)


def test_a_long_message_is_cut(functions):
    with pytest.raises(ValueError) as caught:
        functions["long"]()
    assert len(cause(caught.value)) < 500 and "line 15" in cause(caught.value)


def test_an_error_that_was_never_raised_has_no_line():
    assert cause(KeyError("a")) == "KeyError: 'a'"
    assert cause(SystemExit(3)) == "SystemExit: 3"


class Group(Exception):
    """As ExceptionGroup, which Python 3.10 does not have."""

    def __init__(self, *errors):
        super().__init__("several")
        self.exceptions = errors


def test_of_a_group_of_errors_the_first_one_is_named_with_its_line(functions):
    with pytest.raises(NameError) as caught:
        functions["name"]()
    said = cause(Group(Group(caught.value), KeyError("x")))
    assert said.startswith("NameError: name 'missing' is not defined (in: Group: several)") and "in name:" in said
