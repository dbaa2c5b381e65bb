"""The tables of `dspark bench`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dspark.commands.tables import Section

__all__ = ["bench_tables"]

Figures = Mapping[str, Any]

_NONE = "-"


def bench_tables(results: Figures) -> Iterator[Section]:
    """Speeds, latencies, time by stage, memory and speed-ups by category, of a bench's results."""
    cells = sorted(results["figures"], key=lambda cell: cell["concurrency"])
    yield _speeds(cells, results["baseline"])
    yield _latencies(cells)
    if any(cell["stage_share"] for cell in cells):
        yield _stages(cells)
    yield _memory(cells)
    categories = list(dict.fromkeys(name for cell in cells for name in cell["by_category"]))
    if len(categories) > 1:
        yield _categories(cells, categories)


def _speeds(cells: Sequence[Figures], baseline: str) -> Section:
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
    return Section(("throughput", "at once", *heads), tuple(rows))


def _latencies(cells: Sequence[Figures]) -> Section:
    rows = []
    for cell in cells:
        first, token, chunk = cell["ttft"], cell["inter_token"], cell["inter_chunk"]
        figures = [first["p50"], first["p95"], token["p50"], token["p95"], token["p99"]]
        figures += [chunk["p50"], chunk["max"]]
        rows.append((*_names(cell), *(_milliseconds(figure) for figure in figures)))
    heads = ("first p50", "p95", "token p50", "p95", "p99", "chunk p50", "max")
    return Section(("latency, ms", "at once", *heads), tuple(rows))


def _stages(cells: Sequence[Figures]) -> Section:
    names = ("prefill", "draft", "verify", "rest")
    rows = [
        (*_names(cell), *(_share(cell["stage_share"][name]) for name in names))
        for cell in cells
        if cell["stage_share"]
    ]
    return Section(("time", "at once", *names), tuple(rows))


def _memory(cells: Sequence[Figures]) -> Section:
    heads = {"peak_rss": "process peak", "cache": "K/V cache", "device": "device"}
    known = [name for name in heads if any(cell["memory"][name] for cell in cells)]
    rows = [(*_names(cell), *(_bytes(cell["memory"][name]) for name in known)) for cell in cells]
    columns = ("memory, MiB", "at once", *(heads[name] for name in known))
    return Section(columns, tuple(rows))


def _categories(cells: Sequence[Figures], names: Sequence[str]) -> Section:
    rows = []
    for cell in cells:
        groups = [cell["by_category"].get(name) for name in names]
        shown = [_NONE if group is None else _of_category(group) for group in groups]
        rows.append((*_names(cell), *shown))
    return Section(("tok/s (speed-up)", "at once", *names), tuple(rows))


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
