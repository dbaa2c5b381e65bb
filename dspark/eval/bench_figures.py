"""Figures of a benchmark, made from its raw runs alone; docs/bench.md defines every one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark.eval.bench_records import STAGES, Memory, RequestRecord, RunRecord
from dspark.eval.bench_stats import Resamples, Timings, percentiles, speed_ratios

__all__ = ["bench_figures"]

_POINTS = (50, 95, 99)


@dataclass(frozen=True)
class _Cell:
    """All runs of one configuration at one concurrency, by repeat; R repeats, P prompts."""

    configuration: str
    concurrency: int
    runs: tuple[RunRecord, ...]

    @cached_property
    def answers(self) -> list[RequestRecord]:
        """Answers that did not fail, of all repeats."""
        return [item for run in self.runs for item in run.output.requests if item.error is None]

    @cached_property
    def timings(self) -> Timings:
        """Tokens and times of every answer."""
        rows = [_row(run) for run in self.runs]
        tokens, shares, seconds = (np.array(values) for values in zip(*rows, strict=True))
        return Timings(tokens, shares, seconds)

    def only(self, repeats: Sequence[int]) -> _Cell:
        """The same with some of its repeats."""
        kept = tuple(run for run in self.runs if run.repeat in repeats)
        return _Cell(self.configuration, self.concurrency, kept)

    @property
    def repeats(self) -> list[int]:
        return [run.repeat for run in self.runs]


def _row(run: RunRecord) -> tuple[list[float], list[float], list[float]]:
    """Tokens, share of the run's time, and own time of every answer of a run."""
    requests = run.output.requests
    busy = sum(item.seconds for item in requests)
    scale = run.output.seconds / busy if busy > 0 else 0.0
    tokens = [0.0 if item.error else float(item.output_tokens) for item in requests]
    shares = [0.0 if item.error else item.seconds * scale for item in requests]
    return tokens, shares, [float("nan") if item.error else item.seconds for item in requests]


def bench_figures(
    runs: Sequence[RunRecord],
    *,
    baseline: str,
    seed: int,
    texts_of: frozenset[str] = frozenset(),
    expected_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """Figures of every configuration at every concurrency.

    Args:
        runs: Raw runs; each with the same prompts in the same order.
        baseline: What speed-ups are relative to.
        seed: Of the bootstrap.
        texts_of: Configurations whose answers must be the baseline's, token by token.
        expected_tokens: Tokens that every answer should have, None if they may differ.

    Returns:
        JSON values, in the order in which configurations first ran.
    """
    cells = list(_cells(runs))
    bases = {cell.concurrency: cell for cell in cells if cell.configuration == baseline}
    found = []
    for cell in cells:
        base = None if cell.configuration == baseline else bases.get(cell.concurrency)
        has_text = cell.configuration in texts_of and baseline in texts_of
        found.append(
            {
                "configuration": cell.configuration,
                "concurrency": cell.concurrency,
                "repeats": len(cell.runs),
                **_speeds(cell, seed),
                "speedup": None if base is None else _speedup(cell, base, seed),
                **_latencies(cell.answers),
                "tau": _tau(cell.runs),
                "stage_share": _stage_share(cell.runs),
                "memory": _memory(cell.runs),
                "by_category": _by_category(cell, base),
                "same_text": _same_text(cell, base) if has_text and base is not None else None,
                "ended_early": _ended_early(cell.answers, expected_tokens),
                "failed": _failed(cell.runs),
            }
        )
    return found


def _cells(runs: Sequence[RunRecord]) -> Iterator[_Cell]:
    names = dict.fromkeys(run.configuration for run in runs)
    for name in names:
        for concurrency in sorted({run.concurrency for run in runs}):
            own = [r for r in runs if (r.configuration, r.concurrency) == (name, concurrency)]
            if own:
                yield _Cell(name, concurrency, tuple(sorted(own, key=lambda run: run.repeat)))


# -- speed ------------------------------------------------------------------------------------


def _speeds(cell: _Cell, seed: int) -> dict[str, Any]:
    timings = cell.timings
    draws = Resamples(*timings.tokens.shape, seed=seed)
    users = [_median(row) for row in timings.user_speeds]
    return {
        "tokens_per_second": _spread(timings.speeds.tolist(), draws.speed(timings)),
        "tokens_per_second_per_user": _spread(users, draws.user_speed(timings)),
    }


def _spread(values: Sequence[float], interval: tuple[float, float] | None) -> dict[str, Any]:
    """Median and extremes of the repeats, and the 95 % interval of the median."""
    known = [value for value in values if not np.isnan(value)]
    low, high = (None, None) if interval is None else interval
    if not known:
        return dict.fromkeys(("median", "low", "high", "min", "max"))
    return {
        "median": float(np.median(known)),
        "low": low,
        "high": high,
        "min": min(known),
        "max": max(known),
    }


def _median(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else float("nan")


def _paired(cell: _Cell, base: _Cell) -> tuple[Timings, Timings] | None:
    """Answers that neither failed in, of the repeats that both ran."""
    both = [repeat for repeat in cell.repeats if repeat in base.repeats]
    if not both:
        return None
    mine, theirs = cell.only(both).timings, base.only(both).timings
    kept = mine.is_fine & theirs.is_fine
    return mine.only(kept), theirs.only(kept)


def _speedup(cell: _Cell, base: _Cell, seed: int) -> dict[str, Any] | None:
    paired = _paired(cell, base)
    ratios = [] if paired is None else speed_ratios(*paired)
    if paired is None or not ratios:
        return None
    interval = Resamples(*paired[0].tokens.shape, seed=seed).ratio(*paired)
    return {"over": base.configuration, **_spread(ratios, interval)}


def _by_category(cell: _Cell, base: _Cell | None) -> dict[str, Any]:
    categories = np.array([item.category for item in cell.runs[0].output.requests])
    paired = None if base is None else _paired(cell, base)
    found = {}
    for name in dict.fromkeys(categories.tolist()):
        of = np.broadcast_to(categories == name, cell.timings.tokens.shape)
        speed = _median(cell.timings.only(of & cell.timings.is_fine).speeds)
        ratios = []
        if paired is not None:
            of = np.broadcast_to(categories == name, paired[0].tokens.shape)
            ratios = speed_ratios(*(timings.only(of & timings.is_fine) for timings in paired))
        answers = [item for item in cell.answers if item.category == name]
        found[name] = {
            "tokens_per_second": None if np.isnan(speed) else speed,
            "speedup": float(np.median(ratios)) if ratios else None,
            "tau": _quotient(answers),
        }
    return found


# -- latency, rounds, time, memory ------------------------------------------------------------


def _latencies(answers: Sequence[RequestRecord]) -> dict[str, Any]:
    firsts = [item.ttft for item in answers if item.ttft is not None]
    gaps = [gap for item in answers for gap in item.gaps]
    seconds = np.array([gap for gap, _ in gaps], dtype=np.float64)
    counts = np.array([count for _, count in gaps], dtype=np.int64)
    shares = np.repeat(seconds / np.maximum(counts, 1), counts)
    return {
        "ttft": percentiles(firsts, _POINTS),
        "inter_token": percentiles(shares, _POINTS, has_max=True),
        "inter_chunk": percentiles(seconds, _POINTS, has_max=True),
    }


def _tau(runs: Sequence[RunRecord]) -> float | None:
    """Mean over rounds of the runs' tau."""
    pairs = [(r.output.tau, r.output.rounds) for r in runs]
    known = [(tau, rounds) for tau, rounds in pairs if tau is not None and rounds]
    total = sum(rounds for _, rounds in known)
    return sum(tau * rounds for tau, rounds in known) / total if total else None


def _quotient(answers: Sequence[RequestRecord]) -> float | None:
    rounds = sum(item.rounds or 0 for item in answers)
    committed = sum(item.committed or 0 for item in answers)
    return committed / rounds if rounds else None


def _stage_share(runs: Sequence[RunRecord]) -> dict[str, float] | None:
    known = [run.output.stages for run in runs if run.output.stages is not None]
    total = sum(sum(stages.values()) for stages in known)
    if not total:
        return None
    return {name: sum(stages[name] for stages in known) / total for name in STAGES}


def _memory(runs: Sequence[RunRecord]) -> dict[str, int | None]:
    """The largest of all repeats."""
    found: dict[str, int | None] = {}
    for name in Memory.__slots__:
        values = [getattr(run.memory, name) for run in runs]
        found[name] = max((value for value in values if value is not None), default=None)
    return found


# -- text, failures ---------------------------------------------------------------------------


def _same_text(cell: _Cell, base: _Cell) -> dict[str, int]:
    """Answers with the baseline's tokens, of those that neither failed in."""
    theirs = {run.repeat: run for run in base.runs}
    equal = count = 0
    for run in cell.runs:
        if run.repeat not in theirs:
            continue
        pairs = zip(run.output.requests, theirs[run.repeat].output.requests, strict=True)
        for mine, other in pairs:
            if mine.error is None and other.error is None:
                count += 1
                equal += mine.digest == other.digest
    return {"equal": equal, "of": count}


def _ended_early(answers: Sequence[RequestRecord], expected: int | None) -> int | None:
    """Answers with fewer tokens than all should have."""
    if expected is None:
        return None
    return sum(item.output_tokens < expected for item in answers)


def _failed(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    return [
        {"question_id": item.question_id, "repeat": run.repeat, "error": item.error}
        for run in runs
        for item in run.output.requests
        if item.error is not None
    ]
