"""What changed from one evaluation to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dspark.eval.report.changes import (
    INTERVALS,
    Change,
    Triple,
    difference_cell,
    difference_of,
)
from dspark.eval.report.compare import mates
from dspark.eval.report.labels import pair_name, pair_names
from dspark.eval.report.numbers import decimals, interval
from dspark.eval.report.page import Row, Table
from dspark.eval.report.read import ResultFile
from dspark.eval.report.schema import Acceptance, EvalConfiguration, EvalResults

__all__ = ["EvalPair", "eval_changes", "eval_pairs"]

Files = Sequence[ResultFile[EvalResults]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalPair:
    """A configuration in two files.

    Attributes:
        name: What tables call it.
        first: It, in the first file.
        second: It, in the other one.
    """

    name: str
    first: EvalConfiguration
    second: EvalConfiguration

    @property
    def change(self) -> Change | None:
        """Of tau."""
        return _change(self.first.acceptance, self.second.acceptance)


def eval_pairs(files: Files) -> Iterator[EvalPair]:
    """Every configuration of the first file that another file has, too."""
    for row in mates(files):
        for file, cell in zip(files[1:], row[1:], strict=True):
            if cell is not None:
                yield EvalPair(name=pair_name(files, file, row[0]), first=row[0], second=cell)


def eval_changes(files: Files) -> Table:
    """Changes of tau, of all questions and of each category."""
    rows: list[Row] = []
    for pair in eval_pairs(files):
        for category, one, two in _groups(pair):
            change = difference_cell(_change(one, two), is_more_better=True)
            rows.append((pair.name, category, *map(_with_interval, (one, two)), change))
    return Table(
        title="What changed",
        columns=("configuration", "category", *pair_names(files), "change"),
        groups=(("", 2), ("tau", 3)),
        rows=rows,
        texts=frozenset({0, 1}),
        note=INTERVALS,
    )


def _groups(pair: EvalPair) -> Iterator[tuple[str, Acceptance, Acceptance]]:
    yield "all", pair.first.acceptance, pair.second.acceptance
    groups = pair.first.by_category
    if len(groups) > 1:
        for name, found in groups.items():
            if name in pair.second.by_category:
                yield name, found, pair.second.by_category[name]


def _change(one: Acceptance, two: Acceptance) -> Change | None:
    return difference_of(_tau(one), _tau(two))


def _tau(found: Acceptance) -> Triple:
    return (found.tau, *(found.tau_ci95 or (None, None)))


def _with_interval(found: Acceptance) -> str:
    if found.tau_ci95 is None:
        return decimals(found.tau)
    return f"{decimals(found.tau)} ({interval(*found.tau_ci95)})"
