"""What a report opens with: each result in a line, with its interval and conditions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dspark.eval.report.bench_changes import bench_pairs
from dspark.eval.report.bench_runs import BenchRun, bench_runs
from dspark.eval.report.changes import Change, difference_cell, ratio_cell
from dspark.eval.report.eval_changes import eval_pairs
from dspark.eval.report.labels import named_configurations, pair_names
from dspark.eval.report.numbers import (
    change,
    count,
    decimals,
    interval,
    percent,
    rounded,
    seconds,
    signed,
    time_unit,
    times,
)
from dspark.eval.report.page import Headline, Tone
from dspark.eval.report.read import Inputs, ResultFile
from dspark.eval.report.schema import (
    Acceptance,
    AuditResults,
    BenchResults,
    EvalResults,
    ProfileResults,
    Spread,
)
from dspark.eval.report.schema_simulate import SimulateResults

__all__ = ["VERDICTS", "headlines"]

_PLAIN = 1.0

VERDICTS = {
    "passed": (Tone.GOOD, "no loss found", ""),
    "found": (Tone.BAD, "loss found", ""),
    "inconclusive": (Tone.DOUBT, "not proven", ": no check judged drafted tokens and passed"),
}
"""How an audit ended: tint, words, and why if that is not plain."""


def headlines(inputs: Inputs) -> tuple[Headline, ...]:
    """Speed first, then acceptance, losslessness, step times."""
    found: list[Headline] = []
    if inputs.bench:
        found += (_bench if len(inputs.bench) == 1 else _bench_changes)(inputs.bench)
    if inputs.eval:
        found += (_eval if len(inputs.eval) == 1 else _eval_changes)(inputs.eval)
    for audit in inputs.audit:
        found.append(_audit(audit, is_alone=len(inputs.audit) == 1))
    for profile in inputs.profile:
        found += _profile(profile, is_alone=len(inputs.profile) == 1)
    for simulated in inputs.simulate:
        found += _simulated(simulated, is_alone=len(inputs.simulate) == 1)
    return tuple(found)


def _bench(files: Sequence[ResultFile[BenchResults]]) -> Iterator[Headline]:
    """Each configuration against the baseline, at the lowest and at the highest concurrency."""
    by_label: dict[str, list[BenchRun]] = {}
    for run in bench_runs(files):
        by_label.setdefault(run.label, []).append(run)
    for runs in by_label.values():
        ends = [runs[0], *runs[-1:]] if len(runs) > 1 else runs
        for run in ends:
            if run.figures.speedup is not None and not run.is_baseline:
                yield _speedup(run)
        if runs[0].is_baseline and len(by_label) == 1:
            yield _alone(runs[0])


def _alone(run: BenchRun) -> Headline:
    speed = run.figures.tokens_per_second
    sure = ""
    if speed.low is not None and speed.high is not None:
        sure = f"(95 % {rounded(speed.low)} to {rounded(speed.high)}) "
    return Headline(
        subject=run.label,
        figure=f"{rounded(speed.median)} tok/s",
        text=f"{sure}at concurrency {run.figures.concurrency}",
    )


def _speedup(run: BenchRun) -> Headline:
    """The speed-up, whether it is one, tau, and whether the text is the same."""
    found = run.figures
    speedup = found.speedup or Spread()
    parts = [f"{run.over} {_sure(speedup)}at concurrency {found.concurrency}"]
    if found.tau is not None:
        parts.append(f"tau {decimals(found.tau)}")
    tone = Tone.PLAIN
    if found.same_text is not None:
        same = found.same_text
        parts.append(f"same text in {count(same.equal)} of {count(same.of)} answers")
        tone = Tone.PLAIN if same.equal == same.of else Tone.BAD
    if found.failed:
        parts.append(f"{len(found.failed)} failed")
        tone = Tone.BAD
    figure = times(speedup.median)
    return Headline(subject=run.label, figure=figure, text="; ".join(parts), tone=tone)


def _sure(spread: Spread) -> str:
    """The interval, and words where it does not lie above 1."""
    if spread.low is None or spread.high is None:
        return "(no interval) "
    word = ", not told apart"
    if spread.high < _PLAIN:
        word = ", slower"
    elif spread.low > _PLAIN:
        word = ""
    return f"(95 % {interval(spread.low, spread.high)}{word}) "


def _eval(files: Sequence[ResultFile[EvalResults]]) -> Iterator[Headline]:
    """Tau of every configuration that drafts."""
    for label, cell, _ in named_configurations(files):
        found: Acceptance = cell.acceptance
        if not found.rounds_drafted and not cell.failed:
            continue
        bounds = found.tau_ci95
        sure = "" if bounds is None else f" (95 % {interval(*bounds)})"
        text = f"tokens per round{sure} over {count(found.prompts)} prompts"
        if found.acceptance_rate is not None:
            text += f"; {percent(found.acceptance_rate)} of drafted tokens accepted"
        tone = Tone.PLAIN
        if cell.failed:
            text, tone = text + f"; {len(cell.failed)} questions failed", Tone.BAD
        yield Headline(subject=label, figure=f"tau {decimals(found.tau)}", text=text, tone=tone)


def _bench_changes(files: Sequence[ResultFile[BenchResults]]) -> Iterator[Headline]:
    """Throughput of the other files against the first, at the lowest concurrency of each."""
    heads = " to ".join(pair_names(files))
    seen = set()
    for pair in bench_pairs(files):
        if pair.name in seen or pair.speed is None:
            continue
        seen.add(pair.name)
        cell = ratio_cell(pair.speed, is_more_better=True)
        speeds = (pair.first.tokens_per_second.median, pair.second.tokens_per_second.median)
        text = f"tok/s{_ends(pair.speed, 1.0)} from {heads} at concurrency {pair.concurrency}: "
        text += " to ".join(map(rounded, speeds))
        gains = (pair.first.speedup, pair.second.speedup)
        if gains[0] is not None and gains[1] is not None:
            text += f"; speed-up {times(gains[0].median)} to {times(gains[1].median)}"
        figure = change(pair.speed.value)
        yield Headline(subject=pair.name, figure=figure, text=text, tone=cell.tone)


def _eval_changes(files: Sequence[ResultFile[EvalResults]]) -> Iterator[Headline]:
    """Tau of the other files against the first."""
    heads = " to ".join(pair_names(files))
    for pair in eval_pairs(files):
        taus = (pair.first.acceptance.tau, pair.second.acceptance.tau)
        has_draft = pair.first.acceptance.rounds_drafted or pair.second.acceptance.rounds_drafted
        if pair.change is None or not has_draft:
            continue
        cell = difference_cell(pair.change, is_more_better=True)
        text = f"tau{_ends(pair.change, 0.0)} from {heads}: {' to '.join(map(decimals, taus))}"
        figure = signed(pair.change.value)
        yield Headline(subject=pair.name, figure=figure, text=text, tone=cell.tone)


def _ends(found: Change, nothing: float) -> str:
    """A change's interval, and words where it shows nothing."""
    if found.low is None or found.high is None:
        return " (no interval)"
    word = "" if found.is_beyond(nothing) else ", no change shown"
    show = signed if nothing == 0 else change
    return f" (95 % {show(found.low)} to {show(found.high)}{word})"


def _audit(file: ResultFile[AuditResults], *, is_alone: bool) -> Headline:
    results = file.results
    tone, figure, reason = VERDICTS.get(results.status, (Tone.DOUBT, results.status, ""))
    tally = {s: sum(check.status == s for check in results.checks) for s in VERDICTS}
    counts = ", ".join(f"{n} {status}" for status, n in tally.items() if n) or "no check ran"
    text = f"in what the audit looked at{reason} (checks: {counts})"
    if results.interrupted:
        text, tone = f"{text}; interrupted, so this is part of an audit", Tone.DOUBT
    subject = "audit" if is_alone else f"{file.label}: audit"
    return Headline(subject=subject, figure=figure, text=text, tone=tone)


def _profile(file: ResultFile[ProfileResults], *, is_alone: bool) -> Iterator[Headline]:
    """A step of most rows against one of fewest, after the shortest context."""
    points = [point for point in file.results.points if point.seconds.median is not None]
    if not points:
        return
    context = min(point.context for point in points)
    own = sorted((p for p in points if p.context == context), key=lambda p: p.rows)
    few, many = own[0], own[-1]
    unit = time_unit((many.seconds.median,))
    text = f"for {count(few.rows)} row{'s' if few.rows > 1 else ''}"
    if many is not few:
        text += f", {seconds(many.seconds.median, unit)} {unit} for {count(many.rows)}"
    yield Headline(
        subject="verification step" if is_alone else f"{file.label}: verification step",
        figure=f"{seconds(few.seconds.median, unit)} {unit}",
        text=f"{text}, after {count(context)} tokens of context",
    )


def _simulated(file: ResultFile[SimulateResults], *, is_alone: bool) -> Iterator[Headline]:
    """Throughput at promised speeds, else that nothing was promised."""
    for item in file.results.comparisons:
        subject = item.policy if is_alone else f"{file.label}: {item.policy}"
        for row in item.at_speed:
            if row.ratio is not None:
                yield Headline(
                    subject=subject,
                    figure=times(row.ratio),
                    text=f"simulated throughput over {item.baseline} at {rounded(row.speed)} tok/s "
                    f"a user: {rounded(row.baseline)} to {rounded(row.policy)}",
                )
