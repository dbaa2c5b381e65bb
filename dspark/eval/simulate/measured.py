"""Costs besides the target's forward, from a file of `dspark bench`.

A run at concurrency c spent `draft` seconds in drafting and `rest` seconds in neither prefill,
draft nor verification, over R rounds of its requests. With c requests in every round that is
c draft / R seconds a round, and over several concurrencies a line: base + each c (least squares, no
part below 0). With one concurrency it is taken to grow with the requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark.errors import DataError
from dspark.eval.bench import SCHEMA, VERSION
from dspark.eval.results import read_results
from dspark.eval.simulate.costs import Line

__all__ = ["BenchCosts", "fit_line", "read_bench_costs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchCosts:
    """Costs of a bench's configuration.

    Attributes:
        draft: Drafting.
        rest: What is neither forward nor draft.
        prefill_rate: Prompt tokens a second; None if none were counted.
    """

    draft: Line
    rest: Line
    prefill_rate: float | None


def fit_line(counts: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line through (requests, seconds) with neither part below 0.

    Args:
        counts: Requests, one or more.
        seconds: Seconds for so many.
    """
    x, y = np.array(counts, dtype=np.float64), np.array(seconds, dtype=np.float64)
    through_zero = Line(0.0, float(np.clip((x * y).sum() / (x * x).sum(), 0, None)))
    if len(set(counts)) < 2:
        return through_zero
    each, base = np.polyfit(x, y, 1).tolist()
    if base < 0:
        return through_zero
    return Line(float(base), float(each)) if each >= 0 else Line(float(y.mean()), 0.0)


def read_bench_costs(path: str | Path, configuration: str | None) -> BenchCosts:
    """Read a bench.

    Args:
        path: A result file of `dspark bench`.
        configuration: Which of its configurations; None if it has one besides the baseline.

    Raises:
        DataError: If the file cannot be used, or holds no such configuration with its stages.
    """
    results = read_results(path, SCHEMA, VERSION)
    runs = [run for run in results.get("runs", []) if run.get("stages") and run.get("rounds")]
    names = list(dict.fromkeys(run["configuration"] for run in runs))
    if configuration is None:
        names = [n for n in names if n != results.get("baseline")] or names
    else:
        names = [n for n in names if n == configuration]
    if len(names) != 1:
        asked = "" if configuration is None else f" called {configuration!r}"
        raise DataError(
            f"{path} holds {len(names)} configurations{asked} of dspark's own with the times of "
            "their stages, but one is needed.",
            hint="name one with --bench-configuration",
        )
    return _costs([run for run in runs if run["configuration"] == names[0]])


def _costs(runs: Sequence[dict[str, Any]]) -> BenchCosts:
    counts = [float(run["concurrency"]) for run in runs]
    lines = {}
    for stage in ("draft", "rest"):
        each = [run["concurrency"] * run["stages"][stage] / run["rounds"] for run in runs]
        lines[stage] = fit_line(counts, each)
    prompts = sum(item["prompt_tokens"] for run in runs for item in run["requests"])
    prefill = sum(run["stages"]["prefill"] for run in runs)
    rate = prompts / prefill if prompts and prefill else None
    return BenchCosts(draft=lines["draft"], rest=lines["rest"], prefill_rate=rate)
