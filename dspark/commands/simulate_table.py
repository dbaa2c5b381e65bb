"""What `dspark simulate` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["print_plain", "print_table"]

_COLUMNS = (
    ("tok/s", "tokens_per_second"),
    ("per user", "tokens_per_second_per_user"),
    ("tau", "tau"),
    ("budget", "budget"),
    ("rows", None),
    ("step ms", "seconds_per_round"),
)


def digits(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _load(point: Mapping[str, Any]) -> str:
    return str(point["concurrency"]) if point["rate"] is None else f"{point['rate']:g}/s"


def _value(point: Mapping[str, Any], name: str, key: str | None) -> float | None:
    if key is None:  # rows of a round
        if point.get("requests_per_round") is None or point["budget"] is None:
            return None
        return float(point["requests_per_round"] * (1 + point["budget"]))
    value = point.get(key)
    if value is None:
        return None
    return 1000 * value if name == "step ms" else float(value)


def print_table(results: Mapping[str, Any]) -> None:
    """A table for people, and the comparisons."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    is_open = any(point["rate"] is not None for point in results["points"])
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("arrivals" if is_open else "concurrency", justify="right", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for name, _ in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    if is_open:
        table.add_column("under way", justify="right", no_wrap=True)
        table.add_column("waited p95", justify="right", no_wrap=True)
    before = None
    for point in results["points"]:
        load = _load(point)
        cells = ["" if load == before else load, point["policy"]]
        for name, key in _COLUMNS:
            value = _value(point, name, key)
            cells.append("-" if value is None else digits(value))
        if is_open:
            waited = point.get("waited", {}).get("p95")
            cells.append(digits(point.get("mean_under_way", 0.0)))
            cells.append("-" if waited is None else f"{digits(waited)} s")
        table.add_row(*cells)
        before = load
    console.print(table)
    for line in _compared(results):
        console.print(Text(line))


def _compared(results: Mapping[str, Any]) -> list[str]:
    """Sentences about promised speeds and matched throughput."""
    lines = []
    for item in results["comparisons"]:
        for row in item["at_speed"]:
            lines.append(_at_speed(item, row))
        ratios = [row["ratio"] for row in item["at_throughput"] if row["ratio"] is not None]
        if ratios:
            lines.append(
                f"{item['policy']} over {item['baseline']}, per-user speed at the same throughput: "
                f"{min(ratios) - 1:+.0%} to {max(ratios) - 1:+.0%}"
            )
    return lines


def _at_speed(item: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    start = (
        f"{item['policy']} over {item['baseline']}, throughput at {row['speed']:g} tok/s a user: "
    )
    if row["ratio"] is None:
        who = [name for name in ("policy", "baseline") if row[name] is None]
        names = " and ".join(item[name] for name in who)
        return f"{start}{names} cannot be that fast"
    numbers = f"{digits(row['policy'])} against {digits(row['baseline'])}"
    return f"{start}{numbers} ({row['ratio'] - 1:+.0%})"


def print_plain(results: Mapping[str, Any]) -> None:
    """Tab-separated: one line a point."""
    names = [key or "rows" for _, key in _COLUMNS]
    print("\t".join(["load", "policy", *names]))
    for point in results["points"]:
        cells = [_load(point), point["policy"]]
        for name, key in _COLUMNS:
            value = _value(point, "" if key == "seconds_per_round" else name, key)
            cells.append("" if value is None else f"{value:.6g}")
        print("\t".join(cells))
