"""Check the sizes that keep the code readable: functions, files, positional arguments."""

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MEDIAN_LINES, P95_LINES, MOST_LINES = 12, 50, 80  # of a function
FILE_LINES, KERNEL_FILE_LINES = 300, 400
WING_LINES, ROOMS = 1600, 20  # of a package within rwkv_es; packages and files at its top
POSITIONAL_ARGUMENTS = 5
FOLDERS = ("rwkv_es", "tasks", "scripts")


class Function(NamedTuple):
    """A function and where it stands."""

    where: str
    num_lines: int
    num_positional: int


def main(root: Path) -> int:
    """Print what is over a limit in a working tree. Returns the exit code."""
    files = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    functions = [function for path in files for function in functions_of(path, root)]
    faults = [fault for path in files for fault in file_faults(path, root)]
    faults += [fault for function in functions for fault in function_faults(function)]
    faults += wing_faults(root / "rwkv_es")
    faults += distribution_faults([function.num_lines for function in functions])
    for fault in faults:
        print(fault)
    print(f"style: {len(files)} files, {len(functions)} functions, {len(faults)} over a limit")
    return 1 if faults or not functions else 0


def functions_of(path: Path, root: Path) -> Iterator[Function]:
    """Yield a file's functions, nested ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = [*node.args.posonlyargs, *node.args.args]
            is_method = bool(arguments) and arguments[0].arg in ("self", "cls")
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Function(f"{path.relative_to(root)}:{node.lineno} {node.name}", lines, len(arguments) - is_method)


def function_faults(function: Function) -> Iterator[str]:
    """Yield what is over a limit in a function."""
    if function.num_lines > MOST_LINES:
        yield f"{function.where} has {function.num_lines} lines (at most {MOST_LINES})"
    if function.num_positional > POSITIONAL_ARGUMENTS:
        yield f"{function.where} takes {function.num_positional} positional arguments (at most {POSITIONAL_ARGUMENTS})"


def file_faults(path: Path, root: Path) -> Iterator[str]:
    """Yield whether a file is too long."""
    is_kernel = path.stem.endswith("kernels")
    most = KERNEL_FILE_LINES if is_kernel else FILE_LINES
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    if num_lines > most:
        yield f"{path.relative_to(root)} has {num_lines} lines (at most {most})"


def wing_faults(package: Path) -> Iterator[str]:
    """Yield which wing is too large, and whether there are too many rooms for a map."""
    wings = [path.parent for path in sorted(package.glob("*/__init__.py"))]
    for wing in wings:
        num_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in wing.glob("*.py"))
        if num_lines > WING_LINES:
            yield f"{package.name}/{wing.name} has {num_lines} lines (at most {WING_LINES}); it wants to be two rooms"
    rooms = [*wings, *(path for path in package.glob("*.py") if not path.stem.startswith("__"))]
    if len(rooms) > ROOMS:
        yield f"{package.name} has {len(rooms)} rooms at its top (at most {ROOMS})"


def distribution_faults(num_lines: list[int]) -> Iterator[str]:
    """Yield whether functions are too long on the whole."""
    if len(num_lines) < 2:
        return
    median, p95 = statistics.median(num_lines), statistics.quantiles(num_lines, n=20)[-1]
    if median > MEDIAN_LINES:
        yield f"the median function has {median} lines (at most {MEDIAN_LINES})"
    if p95 > P95_LINES:
        yield f"the 95th percentile of functions has {p95:.0f} lines (at most {P95_LINES})"


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
