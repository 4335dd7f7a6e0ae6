"""Tables for people: drawn on a terminal, plain columns in pipes and logs."""

import shutil
import sys
from collections.abc import Sequence

_NARROWEST = 24  # characters of a terminal that a table is drawn for


def show(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table of texts on stdout; plain columns, two blanks apart, in pipes and on a narrow terminal."""
    if sys.stdout.isatty() and shutil.get_terminal_size().columns >= _NARROWEST:
        _draw(header, rows, title)
        return
    lines = [header, *rows] if any(header) else list(rows)
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    print("\n".join([title, *texts] if title else texts))


def _draw(header: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_header=any(header), pad_edge=False)
    for name in header:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # what looks like markup is text
    if title:
        print(title)
    Console(file=sys.stdout, width=shutil.get_terminal_size().columns, highlight=False).print(table)
