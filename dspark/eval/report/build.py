"""From result files to a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dspark.eval.report.charts import Charts
from dspark.eval.report.compare import Difference, find_differences, refuse
from dspark.eval.report.facts import run_table
from dspark.eval.report.headlines import headlines
from dspark.eval.report.page import DataFile, Page, Section, Table
from dspark.eval.report.read import Inputs, ResultFile, read_inputs
from dspark.eval.report.section_audit import audit_section
from dspark.eval.report.section_bench import bench_section
from dspark.eval.report.section_confidence import confidence_section
from dspark.eval.report.section_eval import acceptance_section
from dspark.eval.report.section_profile import profile_section
from dspark.eval.report.section_simulate import simulate_section
from dspark.eval.report.terms import method, terms

__all__ = ["build_page"]


def build_page(
    paths: Sequence[str | Path], *, title: str | None = None, is_forced: bool = False
) -> Page:
    """Read result files and lay out their report.

    Args:
        paths: Result files.
        title: The page's title; None for one that names the target.
        is_forced: Show files on one page although their machine or settings differ.

    Raises:
        DataError: If a file cannot be used.
        ConfigError: If files do not compare.
    """
    inputs = read_inputs(paths)
    differences = find_differences(inputs)
    if not is_forced:
        refuse(differences)
    return Page(
        title=title or f"Speculative decoding on {_target(inputs.files[0])}",
        subtitle=_subtitle(inputs),
        warnings=tuple(_warnings(differences)),
        headlines=headlines(inputs),
        sections=tuple(_sections(inputs, differences)),
        terms=terms(inputs),
        files=tuple(
            DataFile(
                label=file.label,
                name=file.name,
                kind=file.kind,
                created=_created(file),
                raw=file.raw,
            )
            for file in inputs.files
        ),
    )


def _warnings(differences: Sequence[Difference]) -> Iterator[str]:
    by_files: dict[tuple[str, str], list[str]] = {}
    for item in differences:
        if item.is_setting:
            text = f"{item.field} ({item.values[0]} and {item.values[1]})"
            by_files.setdefault(item.files, []).append(text)
    for (one, two), texts in by_files.items():
        yield (
            f"{one} and {two} do not compare: they differ in {', '.join(texts)}. They are on one "
            "page because --force was given."
        )


def _sections(inputs: Inputs, differences: Sequence[Difference]) -> Iterator[Section]:
    charts = Charts()
    tables = [run_table(inputs), *_noted(differences)]
    yield Section(name="What was run", text=method(inputs), tables=tuple(tables))
    if inputs.bench:
        yield bench_section(inputs.bench, charts)
    if inputs.eval:
        yield acceptance_section(inputs.eval, charts)
        quality = confidence_section(inputs.eval, charts)
        if quality is not None:
            yield quality
    if inputs.profile:
        yield profile_section(inputs.profile, charts)
    if inputs.simulate:
        yield simulate_section(inputs.simulate, charts)
    if inputs.audit:
        yield audit_section(inputs.audit)


def _noted(differences: Sequence[Difference]) -> Iterator[Table]:
    """What differs and may: it is what a comparison is made for."""
    rows = [
        (item.field, " and ".join(item.files), *item.values)
        for item in differences
        if not item.is_setting
    ]
    if rows:
        yield Table(
            title="What differs between the files",
            columns=("field", "files", "first", "second"),
            rows=rows,
            texts=frozenset({0, 1, 2, 3}),
        )


def _target(file: ResultFile[Any]) -> str:
    return str(file.results.header.target.id)


def _created(file: ResultFile[Any]) -> str:
    return str(file.results.header.created or "")


def _subtitle(inputs: Inputs) -> str:
    """The days on which the files were made, and by which version."""
    days = sorted({_created(file)[:10] for file in inputs.files} - {""})
    span = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else ""
    versions = sorted({_version(file) for file in inputs.files} - {""})
    return ", ".join(part for part in (span, *(f"dspark {v}" for v in versions)) if part)


def _version(file: ResultFile[Any]) -> str:
    return str(file.results.header.dspark or "")
