"""The tables of `dspark calibrate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dspark.commands.tables import Section

__all__ = ["calibrate_tables"]

_POSITION = ("n", "observed", "predicted", "unfitted", "head", "head, STS", "fitted", "floor")
_RANK = ("n", "observed", "predicted", "unfitted", "fitted", "floor")


def calibrate_tables(maps: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    """What was fitted, ECE in percent.

    Args:
        maps: Entries of a calibration.
    """
    for entry in maps:
        yield from _tables(entry)


def _tables(entry: Mapping[str, Any]) -> Iterator[Section]:
    name = f"{entry['rule']} T={entry['temperature']:g} {entry['shape']}"
    if not entry["positions"]:
        sts = entry["sts"]["temperatures"]
        rows = tuple(_scale(k, t) for k, t in enumerate(sts, start=1))
        yield Section((name, "temperature"), rows)
        return
    yield Section((name, *_POSITION), tuple(_position(row) for row in entry["positions"]))
    if entry["ranks"]:
        yield Section((f"{name}, children", *_RANK), tuple(_rank(row) for row in entry["ranks"]))


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
