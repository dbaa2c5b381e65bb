"""Confidence: how far the drafters' own survival can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dspark.eval.report.charts import Charts, Frame, Line, Point
from dspark.eval.report.labels import named_configurations
from dspark.eval.report.numbers import count, decimals, percent
from dspark.eval.report.page import Row, Section, Table
from dspark.eval.report.read import ResultFile
from dspark.eval.report.schema import EvalConfiguration, EvalResults

__all__ = ["confidence_section"]


def confidence_section(files: Sequence[ResultFile[EvalResults]], charts: Charts) -> Section | None:
    """Reliability, ECE, AUROC and Brier score; None if nothing drafted."""
    cells = [item for item in named_configurations(files) if item[1].confidence is not None]
    if not cells:
        return None
    lines, rows = [], []
    for label, cell, _ in cells:
        quality = cell.confidence
        most = max((row.count for row in quality.prefix.reliability), default=1)
        points = tuple(
            Point(x=row.predicted, y=row.observed, weight=row.count / most)
            for row in quality.prefix.reliability
        )
        lines.append(Line(label=label, points=points))
        rows += list(_confidence_rows(label, cell))
    frame = Frame(
        x="predicted survival, %", y="came true, %", is_share=True, is_square=True, height=340
    )
    note = "Area of a marker: predictions in its bin. On the dashed line predictions are right."
    drawn = charts.lines("Reliability of confidence", lines, frame, note=note)
    names = ("position", "n", "predicted", "observed", "ECE", "AUROC", "Brier")
    table = Table(
        title="Confidence",
        columns=("configuration", *names, "step ECE", "step AUROC"),
        rows=rows,
    )
    return Section(name="Confidence", charts=drawn, tables=(table,))


def _confidence_rows(label: str, cell: EvalConfiguration) -> Iterator[Row]:
    quality = cell.confidence
    if quality is None:
        return
    parts = [("all", quality.prefix, quality.step)]
    parts += [(str(part.position), part.prefix, part.step) for part in quality.per_position]
    for where, prefix, step in parts:
        figures = (prefix.ece, prefix.auroc, prefix.brier, step.ece, step.auroc)
        shares = (percent(prefix.predicted), percent(prefix.observed))
        shown = [decimals(value, 3) for value in figures]
        yield (label, where, count(prefix.count), *shares, *shown)
