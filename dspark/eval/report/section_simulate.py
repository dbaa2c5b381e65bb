"""Simulated serving: `dspark simulate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dspark.eval.report.charts import Charts, Frame, Line, Point
from dspark.eval.report.numbers import change, decimals, rounded, seconds, time_unit
from dspark.eval.report.page import Chart, Section, Table
from dspark.eval.report.read import ResultFile
from dspark.eval.report.schema_simulate import SimulatedPoint, SimulateResults

__all__ = ["simulate_section"]

Files = Sequence[ResultFile[SimulateResults]]


def simulate_section(files: Files, charts: Charts) -> Section:
    """Frontiers, verification budget by load, comparisons, and what was assumed."""
    text: list[str] = []
    tables: list[Table] = []
    for file in files:
        prefix = "" if len(files) == 1 else f"{file.label}: "
        text += [f"{prefix}assumed: {line}" for line in file.results.assumptions]
        if file.results.interrupted:
            text.append(f"{file.name} is part of a simulation: it was interrupted.")
        tables.append(_points(file, prefix))
        tables += _comparisons(file, prefix)
    return Section(
        name="Simulated serving",
        text=tuple(text),
        charts=(*_frontier(files, charts), *_budget(files, charts)),
        tables=tuple(tables),
    )


def _by_policy(files: Files) -> Iterator[tuple[str, list[SimulatedPoint]]]:
    """Label and points of every policy."""
    for file in files:
        prefix = "" if len(files) == 1 else f"{file.label}: "
        for name in dict.fromkeys(point.policy for point in file.results.points):
            yield prefix + name, [p for p in file.results.points if p.policy == name]


def _load(point: SimulatedPoint) -> str:
    return str(point.concurrency) if point.rate is None else f"{point.rate:g}/s"


def _frontier(files: Files, charts: Charts) -> tuple[Chart, ...]:
    lines = []
    for label, points in _by_policy(files):
        found = [
            Point(x=p.tokens_per_second_per_user, y=p.tokens_per_second)
            for p in points
            if p.tokens_per_second_per_user is not None and p.tokens_per_second is not None
        ]
        lines.append(Line(label=label, points=tuple(found)))
    frame = Frame(
        x="speed of one user (tok/s)", y="throughput of all users (tok/s)", from_zero=True
    )
    note = "A point is a load; up and to the right is better."
    return charts.lines("Simulated throughput against per-user speed", lines, frame, note=note)


def _budget(files: Files, charts: Charts) -> tuple[Chart, ...]:
    lines = []
    for label, points in _by_policy(files):
        found = []
        for point in points:
            load = point.concurrency if point.rate is None else point.rate
            if load is not None and point.budget:
                found.append(Point(x=load, y=point.budget))
        lines.append(Line(label=label, points=tuple(found)))
    frame = Frame(
        x="concurrency, or requests a second",
        y="drafted nodes verified per request and round",
        is_log=True,
        from_zero=True,
    )
    return charts.lines("Verification budget against load", lines, frame)


def _points(file: ResultFile[SimulateResults], prefix: str) -> Table:
    points = file.results.points
    unit = time_unit(point.seconds_per_round for point in points)
    return Table(
        title=f"{prefix}Simulated points",
        columns=("policy", "load", "tok/s", "tok/s per user", "tau", "budget", f"round, {unit}"),
        rows=[
            (
                point.policy,
                _load(point),
                rounded(point.tokens_per_second),
                rounded(point.tokens_per_second_per_user),
                decimals(point.tau),
                decimals(point.budget),
                seconds(point.seconds_per_round, unit),
            )
            for point in points
        ],
    )


def _comparisons(file: ResultFile[SimulateResults], prefix: str) -> Iterator[Table]:
    rows = []
    for item in file.results.comparisons:
        names = (item.policy, item.baseline)
        for one in item.at_speed:
            fixed = f"{rounded(one.speed)} tok/s per user"
            rows.append(
                (*names, fixed, *map(rounded, (one.policy, one.baseline)), _gain(one.ratio))
            )
        for two in item.at_throughput:
            fixed = f"{rounded(two.throughput)} tok/s in all"
            rows.append(
                (*names, fixed, *map(rounded, (two.policy, two.baseline)), _gain(two.ratio))
            )
    if rows:
        yield Table(
            title=f"{prefix}Policies compared",
            columns=("policy", "over", "at the same", "policy's", "other's", "gain"),
            rows=rows,
            texts=frozenset({0, 1, 2}),
            note="At the same per-user speed, throughput is compared; at the same throughput, "
            "per-user speed. Between simulated points linear in speed and in the logarithm of "
            "throughput; a dash where one cannot do it.",
        )


def _gain(ratio: float | None) -> str:
    return change(ratio)
