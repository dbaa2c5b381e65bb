"""A bench's figures, one by one, with what they are figures of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark.eval.report.labels import named_configurations
from dspark.eval.report.read import ResultFile
from dspark.eval.report.schema import BenchConfiguration, BenchFigures, BenchResults

__all__ = ["BenchRun", "bench_runs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRun:
    """A configuration's figures at one concurrency.

    Attributes:
        label: What tables call the configuration.
        configuration: What was timed.
        figures: The figures.
        baseline: Name of the configuration that speed-ups are relative to.
        over: What a sentence calls that.
    """

    label: str
    configuration: BenchConfiguration
    figures: BenchFigures
    baseline: str | None
    over: str

    @property
    def is_baseline(self) -> bool:
        """True if others are held against it."""
        return self.configuration.name == self.baseline


def bench_runs(files: Sequence[ResultFile[BenchResults]]) -> list[BenchRun]:
    """All figures: configurations in order, concurrency rising within each."""
    runs = []
    for label, cell, file in named_configurations(files):
        own = [item for item in file.results.figures if item.configuration == cell.name]
        for item in sorted(own, key=lambda x: x.concurrency):
            runs.append(
                BenchRun(
                    label=label,
                    configuration=cell,
                    figures=item,
                    baseline=file.results.baseline,
                    over=_baseline_of(file.results),
                )
            )
    return runs


def _baseline_of(results: BenchResults) -> str:
    for cell in results.configurations:
        if cell.name == results.baseline and (cell.runner, cell.draft) == ("dspark", "none"):
            return "plain decoding"
    return results.baseline or "the baseline"
