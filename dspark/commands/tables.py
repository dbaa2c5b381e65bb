"""Tables of figures that commands print: for a terminal, and tab-separated for a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Section", "print_plain", "print_tables", "print_wide"]


@dataclass(frozen=True, slots=True)
class Section:
    """One table.

    Attributes:
        heads: Column heads; the first column is text (its head may be the table's name), the
            others are numbers.
        rows: Cells, as many in a row as there are heads.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def print_tables(sections: Iterable[Section]) -> None:
    """Print tables: for people on a terminal, tab-separated elsewhere."""
    (print_wide if sys.stdout.isatty() else print_plain)(sections)


def print_plain(sections: Iterable[Section]) -> None:
    """Print tab-separated lines: a line of heads before each table's rows."""
    for section in sections:
        for row in (section.heads, *section.rows):
            sys.stdout.write("\t".join(row) + "\n")


def print_wide(sections: Iterable[Section]) -> None:
    """Print tables for a terminal, an empty line after each."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for section in sections:
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(section.heads[0], overflow="fold")
        for name in section.heads[1:]:
            table.add_column(name, justify="right", no_wrap=True)
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
        console.print()
