"""Acceptance: tables and charts of `dspark eval`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dspark.eval.report.charts import Charts, Frame, Line, Point
from dspark.eval.report.eval_changes import eval_changes
from dspark.eval.report.facts import describe_sampling
from dspark.eval.report.labels import Named, named_configurations
from dspark.eval.report.numbers import count, decimals, interval, percent, value_text
from dspark.eval.report.page import Chart, Row, Section, Table
from dspark.eval.report.read import ResultFile
from dspark.eval.report.schema import Acceptance, EvalResults

__all__ = ["acceptance_section"]

Files = Sequence[ResultFile[EvalResults]]

_FEW_ROUNDS = 20
"""Below so many rounds a rate is drawn hollow."""
_FEW_PROMPTS = 5
_PLAIN = (1.0, "plain decoding")


def acceptance_section(files: Files, charts: Charts) -> Section:
    """What the target accepted; confidence has a section of its own."""
    cells = named_configurations(files)
    tables = [_lengths(cells), _counts(cells), *_positions(cells)]
    tables += [*_categories(cells), *_contexts(cells), *_definitions(cells), *_failures(cells)]
    drawn = [*_category_chart(cells, charts), *_position_charts(cells, charts)]
    drawn += _budget_chart(cells, charts)
    if len(files) > 1:
        tables.insert(0, eval_changes(files))
    return Section(name="Acceptance", charts=tuple(drawn), tables=tuple(tables))


# -- tables -----------------------------------------------------------------------------------


def _lengths(cells: Sequence[Named]) -> Table:
    rows = []
    for label, cell, _ in cells:
        found = cell.acceptance
        tau, length = found.tau_means, found.accept_len_means
        bounds = found.tau_ci95 or (None, None)
        values = (tau.per_token, tau.per_request)
        more = (length.per_round, length.per_token, length.per_request)
        shown = (decimals(found.tau), interval(*bounds), *map(decimals, (*values, *more)))
        rows.append((label, *shown))
    means = ("per token", "per request")
    return Table(
        title="Accepted length",
        columns=("configuration", "per round", "95 %", *means, "per round", *means),
        groups=(("", 1), ("tau", 4), ("accept_len", 3)),
        rows=rows,
    )


def _counts(cells: Sequence[Named]) -> Table:
    rows = []
    for label, cell, _ in cells:
        found = cell.acceptance
        counts = (found.requests, found.output_tokens, found.rounds, found.rounds_drafted)
        drafted = (found.verified, found.accepted)
        rates = (found.acceptance_rate, found.verify_rate, found.full_acceptance)
        wasted = decimals(found.wasted_per_token)
        rows.append((label, *map(count, (*counts, *drafted)), *map(percent, rates), wasted))
    columns = ("answers", "tokens", "all", "drafted", "verified", "accepted")
    more = ("acceptance", "verify rate", "fully accepted", "per token")
    return Table(
        title="Counts and rates",
        columns=("configuration", *columns, *more),
        groups=(("", 3), ("rounds", 2), ("nodes", 2), ("rate", 3), ("wasted", 1)),
        rows=rows,
    )


def _positions(cells: Sequence[Named]) -> Iterator[Table]:
    drafting = [(label, cell) for label, cell, _ in cells if cell.acceptance.per_position]
    if not drafting:
        return
    deepest = max(len(cell.acceptance.per_position) for _, cell in drafting)
    rows: list[Row] = []
    for label, cell in drafting:
        rates = cell.acceptance.per_position
        for kind in ("conditional", "unconditional"):
            shares = [percent(getattr(rate, kind)) for rate in rates]
            rows.append((label, kind, *shares, *[""] * (deepest - len(rates))))
        reached = [count(rate.reached) for rate in rates]
        rows.append((label, "rounds that came there", *reached, *[""] * (deepest - len(rates))))
    yield Table(
        title="Acceptance by position",
        columns=("configuration", "", *map(str, range(1, deepest + 1))),
        rows=rows,
        texts=frozenset({0, 1}),
    )


def _categories(cells: Sequence[Named]) -> Iterator[Table]:
    names = list(dict.fromkeys(name for _, cell, _ in cells for name in cell.by_category))
    if len(names) < 2:
        return
    rows = []
    for label, cell, _ in cells:
        groups = cell.by_category
        rows.append((label, *(decimals(groups[n].tau) if n in groups else "" for n in names)))
    yield Table(title="Tau by category", columns=("configuration", *names), rows=rows)


def _contexts(cells: Sequence[Named]) -> Iterator[Table]:
    rows = []
    for label, cell, _ in cells:
        for bucket in cell.by_context:
            end = "" if bucket.to is None else count(bucket.to - 1)
            where = f"{count(bucket.from_)} to {end}" if end else f"{count(bucket.from_)} or more"
            counts = (count(bucket.prompts), count(bucket.rounds))
            rows.append((label, where, *counts, decimals(bucket.tau), decimals(bucket.accept_len)))
    if rows:
        yield Table(
            title="By length of context",
            columns=("configuration", "tokens", "prompts", "rounds", "tau", "accept_len"),
            rows=rows,
            note=f"A length with fewer than {_FEW_PROMPTS} prompts says little.",
        )


def _definitions(cells: Sequence[Named]) -> Iterator[Table]:
    names = dict.fromkeys(name for _, cell, _ in cells for name in cell.definitions)
    for name in names:
        rows = []
        for label, cell, _ in cells:
            for key, value in cell.definitions.get(name, {}).items():
                rows += [(label, key, text) for text in _values(key, value)]
        yield Table(
            title=f"As {name} counts",
            columns=("configuration", "figure", "value"),
            rows=rows,
            texts=frozenset({0, 1, 2}),
        )


def _values(key: str, value: Any) -> list[str]:
    if key == "notes":
        return [str(note) for note in value]
    if isinstance(value, list):
        return [", ".join(decimals(v, 3) if isinstance(v, float) else value_text(v) for v in value)]
    return [decimals(value, 3) if isinstance(value, float) else value_text(value)]


def _failures(cells: Sequence[Named]) -> Iterator[Table]:
    rows = [
        (label, str(failure.question_id), failure.error or "")
        for label, cell, _ in cells
        for failure in cell.failed
    ]
    if rows:
        yield Table(
            title="Questions that failed",
            columns=("configuration", "question", "error"),
            rows=rows,
            texts=frozenset({0, 1, 2}),
        )


# -- charts -----------------------------------------------------------------------------------


def _category_chart(cells: Sequence[Named], charts: Charts) -> tuple[Chart, ...]:
    rows: dict[str, dict[str, Point]] = {}
    for label, cell, _ in cells:
        groups = cell.by_category
        if len(groups) < 2 or not cell.acceptance.rounds_drafted:
            continue
        rows[label] = {
            name: _tau_point(0.0, found) for name, found in groups.items() if found.tau is not None
        }
    note = f"95 % intervals over prompts; hollow: fewer than {_FEW_PROMPTS} prompts."
    return charts.dots(
        "Tau by category", rows, x="tau (tokens per round)", reference=_PLAIN, note=note
    )


def _tau_point(x: float, found: Acceptance) -> Point:
    low, high = found.tau_ci95 or (None, None)
    return Point(x=x, y=found.tau or 0.0, low=low, high=high, is_thin=found.prompts < _FEW_PROMPTS)


def _position_charts(cells: Sequence[Named], charts: Charts) -> Iterator[Chart]:
    for kind, y in (
        ("conditional", "accepted, % of rounds that came there"),
        ("unconditional", "accepted, % of all rounds"),
    ):
        lines = []
        for label, cell, _ in cells:
            points = [
                Point(
                    x=rate.position,
                    y=getattr(rate, kind),
                    is_thin=kind == "conditional" and rate.reached < _FEW_ROUNDS,
                )
                for rate in cell.acceptance.per_position
                if getattr(rate, kind) is not None
            ]
            lines.append(Line(label=label, points=tuple(points)))
        note = f"Hollow: fewer than {_FEW_ROUNDS} rounds." if kind == "conditional" else ""
        frame = Frame(x="position (depth in the tree)", y=y, is_share=True)
        yield from charts.lines(f"{kind.capitalize()} acceptance", lines, frame, note=note)


def _budget_chart(cells: Sequence[Named], charts: Charts) -> tuple[Chart, ...]:
    lines: dict[str, list[Point]] = {}
    for _, cell, _ in cells:
        budget = cell.sampling.get("tree_budget")
        if budget and cell.acceptance.tau is not None:
            rest = {k: v for k, v in cell.sampling.items() if k != "tree_budget"}
            label = f"{cell.draft.id}, {describe_sampling(rest)}, {cell.prompts.name}"
            lines.setdefault(label, []).append(_tau_point(budget, cell.acceptance))
    full = [
        Line(label=label, points=tuple(sorted(points, key=lambda p: p.x)))
        for label, points in lines.items()
        if len({point.x for point in points}) > 1
    ]
    frame = Frame(
        x="tree budget (drafted nodes per round)", y="tau (tokens per round)", reference=_PLAIN
    )
    return charts.lines("Tau against tree budget", full, frame, note="95 % intervals over prompts.")
