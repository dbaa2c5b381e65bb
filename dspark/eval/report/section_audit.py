"""Losslessness: `dspark audit`."""

from __future__ import annotations

from collections.abc import Sequence

from dspark.eval.report.headlines import VERDICTS
from dspark.eval.report.numbers import rounded
from dspark.eval.report.page import Cell, Row, Section, Table, Tone
from dspark.eval.report.read import ResultFile
from dspark.eval.report.schema import AuditCheck, AuditResults

__all__ = ["audit_section"]

Files = Sequence[ResultFile[AuditResults]]


def audit_section(files: Files) -> Section:
    """Every check: how it ended, what it saw, what it would have caught."""
    tables = [_checks(file, is_alone=len(files) == 1) for file in files]
    if len(files) > 1:
        tables.insert(0, _side_by_side(files))
    return Section(name="Losslessness", tables=tuple(tables))


def _status(check: AuditCheck | None) -> Cell:
    if check is None:
        return Cell("not run", Tone.DOUBT)
    tone = VERDICTS[check.status][0] if check.status in VERDICTS else Tone.DOUBT
    return Cell(check.status, tone)


def _checks(file: ResultFile[AuditResults], *, is_alone: bool) -> Table:
    rows: list[Row] = []
    for check in file.results.checks:
        parts = [check.evidence, check.power and f"Power: {check.power}"]
        parts.append(check.advice and f"Do: {check.advice}")
        what = ". ".join(part.rstrip(".") for part in parts if part)
        rows.append((check.name, _status(check), what, f"{rounded(check.seconds)} s"))
    return Table(
        title="Checks" if is_alone else f"Checks, {file.label}",
        columns=("check", "result", "evidence", "time"),
        rows=rows,
        texts=frozenset({0, 1, 2}),
    )


def _side_by_side(files: Files) -> Table:
    names = dict.fromkeys(check.name for file in files for check in file.results.checks)
    rows: list[Row] = []
    for name in names:
        found = [
            next((check for check in file.results.checks if check.name == name), None)
            for file in files
        ]
        rows.append((name, *map(_status, found)))
    columns = ("check", *(file.label for file in files))
    return Table(
        title="What changed", columns=columns, rows=rows, texts=frozenset(range(len(columns)))
    )
