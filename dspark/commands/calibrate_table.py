"""The tables of `dspark calibrate`: for a terminal, and tab-separated for a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

__all__ = ["print_results"]

_Table: TypeAlias = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Column heads, the first of them the table's name, and rows."""

_POSITION = ("n", "observed", "predicted", "unfitted", "head", "head, STS", "fitted", "floor")
_RANK = ("n", "observed", "predicted", "unfitted", "fitted", "floor")


def print_results(maps: Sequence[Mapping[str, Any]]) -> None:
    """Print what was fitted, ECE in percent.

    Args:
        maps: Entries of a calibration.
    """
    show = _print_table if sys.stdout.isatty() else _print_plain
    for entry in maps:
        for heads, rows in _tables(entry):
            show(heads, rows)


def _print_plain(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for line in (heads, *rows):
        sys.stdout.write("\t".join(line) + "\n")


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(heads[0], overflow="fold")
    for name in heads[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def _tables(entry: Mapping[str, Any]) -> Iterator[_Table]:
    name = f"{entry['rule']} T={entry['temperature']:g} {entry['shape']}"
    if not entry["positions"]:
        sts = entry["sts"]["temperatures"]
        yield (name, "temperature"), [_scale(k, t) for k, t in enumerate(sts, start=1)]
        return
    yield (name, *_POSITION), [_position(row) for row in entry["positions"]]
    if entry["ranks"]:
        yield (f"{name}, children", *_RANK), [_rank(row) for row in entry["ranks"]]


def _scale(position: int, temperature: float) -> tuple[str, ...]:
    return (f"position {position}", f"{temperature:.3f}")


def _position(row: Mapping[str, Any]) -> tuple[str, ...]:
    errors = [row["ece"][kind] for kind in ("unfitted", "confidence", "scaled", "fitted")]
    figures = [row["observed"], row["predicted"], *errors, row["floor"]]
    return (f"position {row['position']}", str(row["count"]), *map(_percent, figures))


def _rank(row: Mapping[str, Any]) -> tuple[str, ...]:
    errors = [row["ece"][kind] for kind in ("unfitted", "fitted")]
    figures = [row["observed"], row["predicted"], *errors, row["floor"]]
    return (f"child {row['rank']}", str(row["count"]), *map(_percent, figures))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
