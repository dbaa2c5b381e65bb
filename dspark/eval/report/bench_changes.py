"""What changed from one bench to another.

Throughput is compared on the raw runs: what one file ran takes the place of the baseline of the
other, so the interval is that of a speed-up, paired by prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dspark.eval.bench_figures import bench_figures
from dspark.eval.bench_records import RunRecord
from dspark.eval.report.changes import (
    Change,
    Triple,
    difference_cell,
    difference_of,
    ratio_cell,
    ratio_of,
)
from dspark.eval.report.compare import mates
from dspark.eval.report.labels import pair_name, pair_names
from dspark.eval.report.numbers import count, decimals, rounded, seconds, time_unit, times
from dspark.eval.report.page import Row, Table
from dspark.eval.report.read import ResultFile
from dspark.eval.report.schema import (
    BenchConfiguration,
    BenchFigures,
    BenchResults,
    Percentiles,
    Spread,
)

__all__ = ["BenchPair", "bench_changes", "bench_pairs"]

Files = Sequence[ResultFile[BenchResults]]

_BASE, _OTHER = "first", "second"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPair:
    """A configuration at a concurrency, in two files.

    Attributes:
        name: What tables call it.
        concurrency: Requests under way at a time.
        first: Its figures in the first file.
        second: Its figures in the other one.
        speed: Ratio of throughputs; None if one of them is missing.
    """

    name: str
    concurrency: int
    first: BenchFigures
    second: BenchFigures
    speed: Change | None


def bench_pairs(files: Files) -> Iterator[BenchPair]:
    """Every configuration and concurrency of the first file that another file has, too."""
    for row in mates(files):
        base = _by_concurrency(files[0], row[0])
        for file, cell in zip(files[1:], row[1:], strict=True):
            other = {} if cell is None else _by_concurrency(file, cell)
            for concurrency, one in base.items():
                two = other.get(concurrency)
                if two is None:
                    continue
                medians = (one.tokens_per_second.median, two.tokens_per_second.median)
                speed = _throughput(_runs(files[0], one), _runs(file, two))
                yield BenchPair(
                    name=pair_name(files, file, row[0]),
                    concurrency=concurrency,
                    first=one,
                    second=two,
                    speed=speed or ratio_of((medians[0], None, None), (medians[1], None, None)),
                )


def bench_changes(files: Files) -> Iterator[Table]:
    """Changes of speed, then of latency and tau."""
    pairs = list(bench_pairs(files))
    heads = pair_names(files)
    columns = ("configuration", "concurrency", *heads, "change", *heads, "change")
    yield Table(
        title="What changed: speed",
        columns=columns,
        groups=(("", 2), ("tok/s", 3), ("speed-up", 3)),
        rows=[_speed_row(pair) for pair in pairs],
        note="Interval of tok/s: 95 %, paired by prompt, bootstrap over prompts and repeats. Of "
        "the speed-up: from the two figures' own, as if independent, so rather too wide. The two "
        "benches ran at different times: what the machine did differently then is in tok/s, and "
        "mostly not in speed-ups.",
    )
    yield Table(
        title="What changed: latency and tau",
        columns=(*columns, *heads, "change"),
        groups=(("", 2), ("first token, p50", 3), ("between tokens, p50", 3), ("tau", 3)),
        rows=[_latency_row(pair) for pair in pairs],
    )


def _speed_row(pair: BenchPair) -> Row:
    one, two = pair.first, pair.second
    speeds = (one.tokens_per_second.median, two.tokens_per_second.median)
    gains = (one.speedup or Spread(), two.speedup or Spread())
    gain = ratio_of(_triple(gains[0]), _triple(gains[1]))
    return (
        pair.name,
        count(pair.concurrency),
        *map(rounded, speeds),
        ratio_cell(pair.speed, is_more_better=True),
        *(times(spread.median) for spread in gains),
        ratio_cell(gain, is_more_better=True),
    )


def _latency_row(pair: BenchPair) -> Row:
    one, two = pair.first, pair.second
    tau = difference_of((one.tau, None, None), (two.tau, None, None))
    return (
        pair.name,
        count(pair.concurrency),
        *_times(one.ttft, two.ttft),
        *_times(one.inter_token, two.inter_token),
        decimals(one.tau),
        decimals(two.tau),
        difference_cell(tau, is_more_better=True),
    )


def _times(one: Percentiles, two: Percentiles) -> Row:
    """Two medians of times, in one unit, and their change."""
    unit = time_unit((one.p50, two.p50))
    shown = [
        seconds(value, unit) + ("" if value is None else f" {unit}") for value in (one.p50, two.p50)
    ]
    ratio = ratio_of((one.p50, None, None), (two.p50, None, None))
    return (*shown, ratio_cell(ratio, is_more_better=False))


def _by_concurrency(
    file: ResultFile[BenchResults], cell: BenchConfiguration
) -> dict[int, BenchFigures]:
    own = [item for item in file.results.figures if item.configuration == cell.name]
    return {item.concurrency: item for item in sorted(own, key=lambda x: x.concurrency)}


def _runs(file: ResultFile[BenchResults], figures: BenchFigures) -> list[RunRecord] | None:
    """The raw runs behind figures; None if the file has none that can be used."""
    wanted = (figures.configuration, figures.concurrency)
    try:
        return [
            RunRecord.from_json(row)
            for row in file.results.runs
            if (row.get("configuration"), row.get("concurrency")) == wanted
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _throughput(one: list[RunRecord] | None, two: list[RunRecord] | None) -> Change | None:
    """Ratio of throughputs with its interval; None unless both ran the same prompts in order."""
    if not one or not two:
        return None
    runs = [
        replace(run, configuration=name)
        for name, own in ((_BASE, one), (_OTHER, two))
        for run in own
    ]
    prompts = {tuple(item.question_id for item in run.output.requests) for run in runs}
    if len(prompts) > 1:
        return None
    for item in bench_figures(runs, baseline=_BASE, seed=0):
        found = item["speedup"]
        if found is not None:
            return Change(value=found["median"], low=found["low"], high=found["high"])
    return None


def _triple(spread: Spread) -> Triple:
    return spread.median, spread.low, spread.high
