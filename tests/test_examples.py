"""The examples run as they stand; in the default tests with fewer steps."""

import ast
import json
import re

import pytest
from places import ROOT

NOTEBOOK = ROOT / "examples" / "tiny.ipynb"


def run_cells(num_steps):
    """Run a notebook's cells one after the other; return its names and what the last expression of each cell shows."""
    names, shown = {}, []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse(re.sub(r"^STEPS = \d+", f"STEPS = {num_steps}", "".join(cell["source"]), flags=re.M))
        last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, NOTEBOOK.name, "exec"), names)
        shown.append(eval(compile(last, NOTEBOOK.name, "eval"), names) if last else None)
    return names, shown


def test_the_notebook_runs_and_draws_its_curve():
    names, shown = run_cells(2)
    svg = next(value for value in shown if hasattr(value, "_repr_svg_"))._repr_svg_()
    assert svg.startswith("<svg") and len(names["rewards"]) == 2 == svg.count(",")
    assert names["es"].step == 2 and 0 <= names["before"][0] <= 1


@pytest.mark.slow
def test_the_notebook_tunes_the_model():
    names, _ = run_cells(8)
    assert names["after"][0] >= names["before"][0] + 0.5


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
