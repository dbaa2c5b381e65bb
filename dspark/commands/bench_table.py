"""The tables of `dspark bench`: for a terminal, and tab-separated for a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["print_plain", "print_table"]

Figures = Mapping[str, Any]

_NONE = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    """One table.

    Attributes:
        columns: Heads; the first column is text, the others numbers.
        rows: Cells.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def print_plain(results: Figures) -> None:
    """Print tab-separated lines: a line of heads before each table."""
    for section in _sections(results):
        for row in (section.columns, *section.rows):
            sys.stdout.write("\t".join(row) + "\n")


def print_table(results: Figures) -> None:
    """Print tables for a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for section in _sections(results):
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(section.columns[0], overflow="fold")
        for name in section.columns[1:]:
            table.add_column(name, justify="right", no_wrap=True)
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
        console.print()


def _sections(results: Figures) -> Iterator[_Section]:
    cells = sorted(results["figures"], key=lambda cell: cell["concurrency"])
    yield _speeds(cells, results["baseline"])
    yield _latencies(cells)
    if any(cell["stage_share"] for cell in cells):
        yield _stages(cells)
    yield _memory(cells)
    categories = list(dict.fromkeys(name for cell in cells for name in cell["by_category"]))
    if len(categories) > 1:
        yield _categories(cells, categories)


def _speeds(cells: Sequence[Figures], baseline: str) -> _Section:
    rows = []
    for cell in cells:
        speed, speedup = cell["tokens_per_second"], cell["speedup"]
        same = cell["same_text"]
        rows.append(
            (
                *_names(cell),
                _number(speed["median"]),
                _range(speed, 1),
                "1" if cell["configuration"] == baseline else _times(speedup),
                _NONE if speedup is None else _range(speedup, 2),
                _number(cell["tokens_per_second_per_user"]["median"]),
                _number(cell["tau"], 2),
                _NONE if same is None else f"{same['equal']}/{same['of']}",
            )
        )
    heads = ("tok/s", "95 %", f"over {baseline}", "95 %", "per user", "tau", "same text")
    return _Section(columns=("throughput", "at once", *heads), rows=tuple(rows))


def _latencies(cells: Sequence[Figures]) -> _Section:
    rows = []
    for cell in cells:
        first, token, chunk = cell["ttft"], cell["inter_token"], cell["inter_chunk"]
        figures = [first["p50"], first["p95"], token["p50"], token["p95"], token["p99"]]
        figures += [chunk["p50"], chunk["max"]]
        rows.append((*_names(cell), *(_milliseconds(figure) for figure in figures)))
    heads = ("first p50", "p95", "token p50", "p95", "p99", "chunk p50", "max")
    return _Section(columns=("latency, ms", "at once", *heads), rows=tuple(rows))


def _stages(cells: Sequence[Figures]) -> _Section:
    names = ("prefill", "draft", "verify", "rest")
    rows = [
        (*_names(cell), *(_share(cell["stage_share"][name]) for name in names))
        for cell in cells
        if cell["stage_share"]
    ]
    return _Section(columns=("time", "at once", *names), rows=tuple(rows))


def _memory(cells: Sequence[Figures]) -> _Section:
    heads = {"peak_rss": "process peak", "cache": "K/V cache", "device": "device"}
    known = [name for name in heads if any(cell["memory"][name] for cell in cells)]
    rows = [(*_names(cell), *(_bytes(cell["memory"][name]) for name in known)) for cell in cells]
    columns = ("memory, MiB", "at once", *(heads[name] for name in known))
    return _Section(columns=columns, rows=tuple(rows))


def _categories(cells: Sequence[Figures], names: Sequence[str]) -> _Section:
    rows = []
    for cell in cells:
        groups = [cell["by_category"].get(name) for name in names]
        shown = [_NONE if group is None else _of_category(group) for group in groups]
        rows.append((*_names(cell), *shown))
    return _Section(columns=("tok/s (speed-up)", "at once", *names), rows=tuple(rows))


def _of_category(group: Figures) -> str:
    speedup = "" if group["speedup"] is None else f" ({group['speedup']:.2f})"
    return _number(group["tokens_per_second"]) + speedup


def _names(cell: Figures) -> tuple[str, str]:
    return cell["configuration"], str(cell["concurrency"])


def _number(value: float | None, digits: int = 1) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"


def _times(speedup: Figures | None) -> str:
    return _NONE if speedup is None else _number(speedup["median"], 2)


def _range(spread: Figures, digits: int) -> str:
    if spread["low"] is None:
        return _NONE
    return f"{spread['low']:.{digits}f}..{spread['high']:.{digits}f}"


def _milliseconds(value: float | None) -> str:
    return _NONE if value is None else f"{1000 * value:.1f}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _bytes(value: int | None) -> str:
    return _NONE if value is None else f"{value / 2**20:.0f}"
