"""What `table.py` measures and how it is told."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common import milliseconds, ratio, spread

__all__ = [
    "ROWS",
    "STOCK",
    "Figures",
    "Group",
    "Run",
    "Texts",
    "Way",
    "print_goals",
    "print_speeds",
    "print_steps",
]

STOCK = "transformers.generate"
ROWS = (1, 4, 8, 16)

Texts = list[list[int]]
Run = Callable[[Texts, bool, int], tuple[float, Texts]]
"""Prompts, whether all at once, tokens at the most -> seconds and texts."""

RIVALS = {
    "llama.cpp": ("dspark int4, drafted", "dspark int8, drafted"),
    "vLLM": ("dspark, drafted", "dspark int4, drafted"),
}
"""Beginnings of other engines' names -> ways that are compared with them."""


@dataclass(frozen=True)
class Way:
    """A way to decode.

    Attributes:
        name: Of the table's row.
        run: Answers prompts.
        like: The way whose texts it should have.
        is_single: It takes one prompt at a time only.
    """

    name: str
    run: Run
    like: str = STOCK
    is_single: bool = False


@dataclass(frozen=True)
class Group:
    """Questions that are measured together."""

    name: str
    prompts: Texts
    is_together: bool = False


@dataclass
class Figures:
    """What was measured, by turn.

    Attributes:
        tokens: By (way, group).
        seconds: By (way, group).
        same: Texts that are those of the way named by `like`, and all texts, by (way, group).
        steps: Seconds by (path, rows).
        memory: Bytes that are read in a second.
    """

    tokens: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    same: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    steps: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    memory: list[float] = field(default_factory=list)

    def speed(self, way: str, groups: list[str], turns: int) -> list[float]:
        """Tokens per second over some groups together, by turn; empty if one was not run."""
        keys = [(way, group) for group in groups]
        if any(len(self.seconds.get(key, ())) < turns for key in keys):
            return []
        return [
            sum(self.tokens[key][turn] for key in keys)
            / sum(self.seconds[key][turn] for key in keys)
            for turn in range(turns)
        ]


def cell(values: dict[str, float], digits: int) -> str:
    """A median with what it ranges over."""
    least, largest = f"{values['least']:.{digits}f}", f"{values['largest']:.{digits}f}"
    return f"{values['median']:8.{digits}f} {f'({least}-{largest})':>14s}"


def sections(groups: list[Group]) -> dict[str, list[str]]:
    """What the table has a part for: each group, and those of single questions together."""
    single = [group.name for group in groups if not group.is_together]
    found = {name: [name] for name in single}
    found["all one at a time"] = single
    return found | {group.name: [group.name] for group in groups if group.is_together}


def print_speeds(
    ways: list[Way], groups: list[Group], figures: Figures, turns: int
) -> dict[str, Any]:
    """Tokens per second, ratios to transformers.generate, texts; the same as a dictionary."""
    report: dict[str, Any] = {}
    print(f"{'':34s} {'tokens/s':>23s} {'x generate':>23s}  same text as")
    for title, names in sections(groups).items():
        print(f"-- {title}")
        reference = figures.speed(STOCK, names, turns)
        for way in ways:
            speeds = figures.speed(way.name, names, turns)
            if not speeds:
                continue
            counts = [figures.same[way.name, name] for name in names]
            same, texts = (sum(column) for column in zip(*counts, strict=True))
            entry = {
                "tokens/s": spread(speeds, 2),
                "x generate": ratio(speeds, reference),
                "same text": {"as": way.like, "texts": same, "of": texts},
            }
            report.setdefault(title, {})[way.name] = entry
            print(
                f"{way.name:34s} {cell(entry['tokens/s'], 1)} {cell(entry['x generate'], 2)}  "
                f"{way.like} {same}/{texts}"
            )
    return report


def print_goals(
    ways: list[Way], groups: list[Group], figures: Figures, turns: int
) -> dict[str, Any]:
    """Ours over the others', turn by turn."""
    pairs = [
        (ours, way.name)
        for way in ways
        for rival, names in RIVALS.items()
        for ours in names
        if way.name.startswith(rival)
    ]
    report: dict[str, Any] = {}
    for title, names in list(sections(groups).items())[-2:]:
        for ours, other in pairs:
            upper, lower = (figures.speed(way, names, turns) for way in (ours, other))
            if upper and lower:
                values = ratio(upper, lower)
                report.setdefault(title, {})[f"{ours} / {other}"] = values
                print(f"{title:20s} {f'{ours} / {other}':56s} {cell(values, 2)}")
    return report


def print_steps(figures: Figures, sizes: dict[str, int]) -> dict[str, Any]:
    """Milliseconds of a step by path and rows, and the floor that memory sets."""
    speed = statistics.median(figures.memory)
    print(f"a step, ms; memory gives {speed / 1e9:.1f} GB/s")
    report: dict[str, Any] = {}
    for name, size in sizes.items():
        times = {rows: milliseconds(figures.steps[name, rows]) for rows in ROWS}
        floor = 1e3 * size / speed
        report[name] = {"floor": round(floor, 2), "bytes": size, "rows": times}
        cells = " ".join(f"{rows:3d} rows {cell(times[rows], 1)}" for rows in ROWS)
        print(f"{name:20s} floor {floor:6.1f} {cells}")
    return report
