"""Step times: `dspark profile`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dspark.eval.report.changes import ratio_cell, ratio_of
from dspark.eval.report.charts import Charts, Frame, Line, Point
from dspark.eval.report.labels import pair_names
from dspark.eval.report.numbers import NONE, count, decimals, rounded, seconds, time_unit
from dspark.eval.report.page import Row, Section, Table
from dspark.eval.report.read import ResultFile
from dspark.eval.report.schema import ProfilePoint, ProfileResults

__all__ = ["profile_section"]

Files = Sequence[ResultFile[ProfileResults]]


def profile_section(files: Files, charts: Charts) -> Section:
    """Verification steps per second against rows, and experts woken."""
    lines = []
    for file in files:
        for context in sorted({point.context for point in file.results.points}):
            prefix = "" if len(files) == 1 else f"{file.label}: "
            points = [_point(p) for p in _points(file) if p.context == context]
            lines.append(
                Line(
                    label=f"{prefix}{count(context)} tokens of context",
                    points=tuple(point for point in points if point is not None),
                )
            )
    frame = Frame(
        x="rows in the step (drafted nodes and anchors)",
        y="verification steps per second",
        is_log=True,
        from_zero=True,
    )
    note = "Medians and quartiles of the repeats; nothing is smoothed."
    drawn = charts.lines("Verification steps per second", lines, frame, note=note)
    tables = [_steps(file, is_alone=len(files) == 1) for file in files]
    if len(files) > 1:
        tables.insert(0, _changes(files))
    for file in files:
        tables += _experts(file, is_alone=len(files) == 1)
    stopped = [file.name for file in files if file.results.interrupted]
    text = tuple(f"{name} is part of a profile: it was interrupted." for name in stopped)
    return Section(name="Step time", text=text, charts=drawn, tables=tuple(tables))


def _points(file: ResultFile[ProfileResults]) -> list[ProfilePoint]:
    return sorted(file.results.points, key=lambda p: (p.context, p.rows))


def _point(point: ProfilePoint) -> Point | None:
    """Steps per second; a time's upper end is a rate's lower one."""
    spread = point.seconds
    if not spread.median:
        return None
    return Point(
        x=point.rows,
        y=1 / spread.median,
        low=1 / spread.high if spread.high else None,
        high=1 / spread.low if spread.low else None,
    )


def _steps(file: ResultFile[ProfileResults], *, is_alone: bool) -> Table:
    unit = time_unit(point.seconds.high for point in file.results.points)
    rows = []
    for point in _points(file):
        spread = point.seconds
        has_quartiles = spread.low is not None and spread.high is not None
        ends = f"{seconds(spread.low, unit)} to {seconds(spread.high, unit)}"
        rate = rounded(1 / spread.median) if spread.median else NONE
        cells = (count(point.context), count(point.rows), seconds(spread.median, unit))
        rows.append((*cells, ends if has_quartiles else NONE, rate, count(point.repeats)))
    return Table(
        title="Verification steps" if is_alone else f"Verification steps, {file.label}",
        columns=("context", "rows", f"median, {unit}", f"quartiles, {unit}", "steps/s", "repeats"),
        rows=rows,
        texts=frozenset(),
    )


def _experts(file: ResultFile[ProfileResults], *, is_alone: bool) -> Iterator[Table]:
    if file.results.experts:
        yield Table(
            title="Experts woken" if is_alone else f"Experts woken, {file.label}",
            columns=("rows", "distinct experts of a layer, mean"),
            rows=[
                (count(item.rows), decimals(item.distinct_experts, 1))
                for item in file.results.experts
            ],
            texts=frozenset(),
        )


def _changes(files: Files) -> Table:
    rows: list[Row] = []
    first = {(point.context, point.rows): point for point in _points(files[0])}
    for file in files[1:]:
        for point in _points(file):
            base = first.get((point.context, point.rows))
            if base is None:
                continue
            spreads = (base.seconds, point.seconds)
            medians = [spread.median for spread in spreads]
            ratio = ratio_of((medians[0], None, None), (medians[1], None, None))
            change = ratio_cell(ratio, is_more_better=False)
            unit = time_unit(medians)
            shown = [f"{seconds(median, unit)} {unit}" for median in medians]
            rows.append((file.label, count(point.context), count(point.rows), *shown, change))
    return Table(
        title="What changed",
        columns=("file", "context", "rows", *pair_names(files), "change"),
        rows=rows,
        note="Changes of medians; what the machine did differently in the meantime is in them.",
    )
