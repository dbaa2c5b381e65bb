"""Speed: the tables of `dspark bench`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dspark.eval.report.bench_changes import bench_changes
from dspark.eval.report.bench_charts import bench_charts
from dspark.eval.report.bench_runs import BenchRun, bench_runs
from dspark.eval.report.charts import Charts
from dspark.eval.report.facts import describe_sampling
from dspark.eval.report.labels import named_configurations
from dspark.eval.report.numbers import (
    NONE,
    count,
    decimals,
    interval,
    percent,
    rounded,
    seconds,
    size,
    time_unit,
    times,
)
from dspark.eval.report.page import Cell, Row, Section, Table, Tone
from dspark.eval.report.read import ResultFile
from dspark.eval.report.schema import BenchFigures, BenchResults, Spread

__all__ = ["bench_section"]

Files = Sequence[ResultFile[BenchResults]]


def bench_section(files: Files, charts: Charts) -> Section:
    """Speed, latency, time of a round, memory."""
    runs = bench_runs(files)
    tables = [_speeds(runs), *_latencies(runs), *_costs(runs)]
    tables += [*_categories(runs), *_configurations(files), *_failures(runs), *_skipped(files)]
    if len(files) > 1:
        tables = [*bench_changes(files), *tables]
    return Section(name="Speed", charts=bench_charts(runs, charts), tables=tuple(tables))


def _speeds(runs: Sequence[BenchRun]) -> Table:
    rows: list[Row] = []
    for run in runs:
        found = run.figures
        speed, user = found.tokens_per_second, found.tokens_per_second_per_user
        speedup = found.speedup or Spread()
        gain = (
            ("baseline", "")
            if run.is_baseline
            else (times(speedup.median), interval(speedup.low, speedup.high))
        )
        speeds = (rounded(speed.median), _range(speed), rounded(user.median), _range(user))
        end = (decimals(found.tau), _same(found))
        rows.append((run.label, count(found.concurrency), *speeds, *gain, *end))
    return Table(
        title="Throughput",
        columns=("configuration", "concurrency", *("median", "95 %") * 3, "tau", "same text"),
        groups=(("", 2), ("tok/s", 2), ("tok/s per user", 2), ("speed-up", 2)),
        rows=rows,
    )


def _range(spread: Spread) -> str:
    if spread.low is None or spread.high is None:
        return NONE
    return f"{rounded(spread.low)} to {rounded(spread.high)}"


def _same(found: BenchFigures) -> Cell:
    same = found.same_text
    if same is None:
        return Cell(NONE)
    tone = Tone.GOOD if same.equal == same.of else Tone.BAD
    return Cell(f"{count(same.equal)} of {count(same.of)}", tone)


_BY_CATEGORY = (
    ("tokens_per_second", "tok/s", rounded),
    ("speedup", "speed-up", times),
    ("tau", "tau", decimals),
)
_LATENCIES = (
    ("first token", "ttft", ("p50", "p95", "p99")),
    ("between tokens", "inter_token", ("p50", "p95", "p99", "max")),
    ("between chunks", "inter_chunk", ("p50", "p95", "p99", "max")),
)


def _latencies(runs: Sequence[BenchRun]) -> Iterator[Table]:
    """Times to the first token, between tokens and between chunks, each in a unit of its own."""
    rows: list[list[str | Cell]] = [[run.label, count(run.figures.concurrency)] for run in runs]
    groups, columns = [("", 2)], ["configuration", "concurrency"]
    for head, name, keys in _LATENCIES:
        values = [[getattr(getattr(run.figures, name), key) for key in keys] for run in runs]
        known = [value for row in values for value in row if value is not None]
        if not known:
            continue
        unit = time_unit(known)
        groups.append((f"{head}, {unit}", len(keys)))
        columns += keys
        for row, found in zip(rows, values, strict=True):
            row += [seconds(value, unit) for value in found]
    if len(groups) > 1:
        yield Table(title="Latency", columns=tuple(columns), groups=tuple(groups), rows=rows)


def _costs(runs: Sequence[BenchRun]) -> Iterator[Table]:
    """Shares of the time, and memory; only what was measured of any configuration."""
    stages = list(dict.fromkeys(name for run in runs for name in run.figures.stage_share or {}))
    places = [
        (name, head)
        for name, head in (("peak_rss", "process"), ("cache", "K/V cache"), ("device", "device"))
        if any(getattr(run.figures.memory, name, None) is not None for run in runs)
    ]
    if not stages and not places:
        return
    rows = []
    for run in runs:
        shares, memory = run.figures.stage_share or {}, run.figures.memory
        time = [percent(shares.get(name)) for name in stages]
        room = [size(getattr(memory, name, None)) for name, _ in places]
        rows.append((run.label, count(run.figures.concurrency), *time, *room))
    groups = (("", 2), ("share of time", len(stages)), ("memory, most", len(places)))
    yield Table(
        title="Time and memory",
        columns=("configuration", "concurrency", *stages, *(head for _, head in places)),
        groups=tuple((head, width) for head, width in groups if width),
        rows=rows,
    )


def _categories(runs: Sequence[BenchRun]) -> Iterator[Table]:
    """Each category at the lowest concurrency; the others are in the data."""
    names = list(dict.fromkeys(name for run in runs for name in run.figures.by_category))
    if len(names) < 2:
        return
    least = min(run.figures.concurrency for run in runs)
    rows: list[Row] = []
    for run in (run for run in runs if run.figures.concurrency == least):
        groups = run.figures.by_category
        for what, word, show in _BY_CATEGORY:
            values = [getattr(groups[n], what) if n in groups else None for n in names]
            if any(value is not None for value in values):
                rows.append((run.label, word, *map(show, values)))
    yield Table(
        title=f"By category, at concurrency {count(least)}",
        columns=("configuration", "", *names),
        rows=rows,
        texts=frozenset({0, 1}),
    )


def _configurations(files: Files) -> Iterator[Table]:
    rows = []
    for label, cell, _ in named_configurations(files):
        library = cell.library
        by = [cell.runner, cell.mode]
        if library is not None:
            by += [library.name if library.name != cell.runner else None, library.version]
        where = cell.url or ""
        sampling = describe_sampling(cell.sampling)
        rows.append(
            (
                label,
                " ".join(part for part in by if part),
                cell.draft or "",
                {True: "on", False: "off", None: NONE}[cell.is_exact],
                sampling,
                "; ".join(part for part in (where, cell.note) if part),
            )
        )
    columns = ("configuration", "run by", "draft", "exact mode", "sampling", "notes")
    yield Table(
        title="Configurations", columns=columns, rows=rows, texts=frozenset(range(len(columns)))
    )


def _failures(runs: Sequence[BenchRun]) -> Iterator[Table]:
    short = [
        (run.label, count(run.figures.concurrency), count(run.figures.ended_early))
        for run in runs
        if run.figures.ended_early
    ]
    if short:
        yield Table(
            title="Answers that ended early",
            columns=("configuration", "concurrency", "answers"),
            rows=short,
        )
    rows = [
        (run.label, count(run.figures.concurrency), str(item.question_id), item.error or "")
        for run in runs
        for item in run.figures.failed
    ]
    if rows:
        yield Table(
            title="Answers that failed",
            columns=("configuration", "concurrency", "question", "error"),
            rows=rows,
            texts=frozenset({0, 2, 3}),
        )


def _skipped(files: Files) -> Iterator[Table]:
    rows = [
        (item.configuration, count(item.concurrency), item.reason)
        for file in files
        for item in file.results.skipped
    ]
    if rows:
        yield Table(
            title="Not run",
            columns=("configuration", "concurrency", "why"),
            rows=rows,
            texts=frozenset({0, 2}),
        )
