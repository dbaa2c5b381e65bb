"""The charts of `dspark bench`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dspark.eval.report.bench_runs import BenchRun
from dspark.eval.report.charts import Charts, Frame, Line, Point
from dspark.eval.report.facts import describe_sampling
from dspark.eval.report.page import Chart

__all__ = ["bench_charts"]

_PLAIN = 1.0
_NOTE = "95 % intervals over prompts and repeats."


def bench_charts(runs: Sequence[BenchRun], charts: Charts) -> tuple[Chart, ...]:
    """Throughput against per-user speed, speed-up against concurrency and against tree budget."""
    return (
        *_tradeoff(runs, charts),
        *_over_concurrency(runs, charts),
        *_over_budget(runs, charts),
    )


def _grouped(runs: Sequence[BenchRun]) -> dict[str, list[BenchRun]]:
    groups: dict[str, list[BenchRun]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def _tradeoff(runs: Sequence[BenchRun], charts: Charts) -> tuple[Chart, ...]:
    """Throughput against per-user speed over a sweep of concurrency."""
    if len({run.figures.concurrency for run in runs}) < 2:
        return ()
    lines = []
    for label, own in _grouped(runs).items():
        points = [
            Point(
                x=run.figures.tokens_per_second_per_user.median,
                y=run.figures.tokens_per_second.median,
                text=str(run.figures.concurrency),
            )
            for run in own
            if run.figures.tokens_per_second.median is not None
            and run.figures.tokens_per_second_per_user.median is not None
        ]
        lines.append(Line(label=label, points=tuple(points)))
    frame = Frame(
        x="speed of one user (tok/s)", y="throughput of all users (tok/s)", from_zero=True
    )
    note = "Numbers beside the points: concurrency. Up and to the right is better."
    return charts.lines("Throughput against per-user speed", lines, frame, note=note)


def _over_concurrency(runs: Sequence[BenchRun], charts: Charts) -> tuple[Chart, ...]:
    if len({run.figures.concurrency for run in runs}) < 2:
        return ()
    lines = [
        Line(
            label=label,
            points=tuple(
                point
                for run in own
                if not run.is_baseline
                and (point := _speedup_point(run.figures.concurrency, run)) is not None
            ),
        )
        for label, own in _grouped(runs).items()
    ]
    frame = Frame(x="concurrency", y="speed-up (×)", is_log=True, reference=_reference(runs))
    return charts.lines("Speed-up against concurrency", lines, frame, note=_NOTE)


def _over_budget(runs: Sequence[BenchRun], charts: Charts) -> tuple[Chart, ...]:
    lines: dict[str, list[Point]] = {}
    for run in runs:
        sampling: dict[str, Any] = run.configuration.sampling
        budget = sampling.get("tree_budget")
        point = _speedup_point(budget, run) if budget else None
        if point is None:
            continue
        rest = describe_sampling({k: v for k, v in sampling.items() if k != "tree_budget"})
        by = run.configuration.draft or run.configuration.runner
        label = f"{by}, {rest}, concurrency {run.figures.concurrency}"
        lines.setdefault(label, []).append(point)
    full = [
        Line(label=label, points=tuple(sorted(points, key=lambda p: p.x)))
        for label, points in lines.items()
        if len({point.x for point in points}) > 1
    ]
    frame = Frame(
        x="tree budget (drafted nodes per round)", y="speed-up (×)", reference=_reference(runs)
    )
    return charts.lines("Speed-up against tree budget", full, frame, note=_NOTE)


def _speedup_point(x: float, run: BenchRun) -> Point | None:
    speedup = run.figures.speedup
    if speedup is None or speedup.median is None:
        return None
    return Point(x=x, y=speedup.median, low=speedup.low, high=speedup.high)


def _reference(runs: Sequence[BenchRun]) -> tuple[float, str]:
    names = {run.over for run in runs}
    return _PLAIN, names.pop() if len(names) == 1 else "baseline"
