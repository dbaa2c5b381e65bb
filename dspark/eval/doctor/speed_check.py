"""Does drafting pay here? The cost model on measured steps, and a short run to check it against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from dspark.engine import Engine, EngineConfig
from dspark.eval.acceptance import bootstrap_tau
from dspark.eval.doctor.cost import BudgetRun, Price, best_price, price, price_all
from dspark.eval.doctor.exam import Exam
from dspark.eval.doctor.findings import CheckResult, Finding, Severity
from dspark.eval.doctor.replay import Replay, ReplayConfig, replay
from dspark.eval.profile import Profile, is_measured, seconds_for
from dspark.eval.profile_measure import quick_profile
from dspark.request import SamplingParams
from dspark.rounds import RoundLimits

__all__ = ["MeasuredRun", "SpeedResult", "check_speed", "measured_run"]

_BUDGETS = (1, 3, 7, 15, 31)
_QUICK_BUDGETS = (3, 15)
_USERS = (1, 2, 4, 8)
_WORTH = 1.05  # speed-up from which drafting is worth its trouble
_BETTER = 1.1  # over the budget in use, before another one is advised


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """Plain and drafted decoding of the same prompts, taking turns.

    Attributes:
        budget: Drafted nodes of a round at the most.
        plain: Tokens per second of plain rounds, prefill left out.
        drafted: The same with the draft.
        tau: Of the drafted rounds.
        rest: Seconds of a drafted round outside the drafter and the target.
    """

    budget: int
    plain: float
    drafted: float
    tau: float
    rest: float

    @property
    def speedup(self) -> float:
        """Drafted over plain."""
        return self.drafted / self.plain


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedResult:
    """The check's result and the cost model's table.

    Attributes:
        check: The check.
        table: Ready for JSON; None if there was nothing to price.
    """

    check: CheckResult
    table: dict[str, Any] | None


def check_speed(exam: Exam, *, on_step: Callable[[str], None] | None = None) -> SpeedResult:
    """Predict the speed-up of each tree budget, and compare one with a measured run.

    Args:
        exam: The pair.
        on_step: Told what runs now.
    """
    name, drafter, config = "speed", exam.patient.drafter, exam.config
    if drafter is None or not exam.tree.places or exam.tree.error is not None:
        return SpeedResult(check=CheckResult.skipped(name, "nothing is drafted"), table=None)
    tell = on_step or (lambda what: None)
    tell("measuring steps")
    context = int(np.median([place.context for place in exam.tree.places]))
    seconds = config.step_seconds
    if seconds is None:
        seconds = 2.0 if config.is_quick else 6.0
    curve = quick_profile(
        exam.patient.target,
        codec=exam.patient.codec,
        context=context,
        seconds=seconds,
        clock=exam.clock,
    )

    def step(rows: float) -> float:
        return seconds_for(curve, rows, context)

    tell("trying tree budgets")
    replays = {budget: _rounds(exam, budget) for budget in _budgets(exam)}
    runs = [_run_of(budget, own) for budget, own in replays.items()]
    prices = price_all(runs, step)
    best = best_price(prices)
    users = _by_users(next(run for run in runs if run.budget == best.budget), curve, context)
    measured = None
    if config.has_run:
        tell("a measured run")
        measured = measured_run(exam, best.budget)
    high = _tau_bound(exam, replays[best.budget])
    found = _findings(exam, prices, best, users, high=high)
    table = {
        "formula": "speed-up = tau * step(1) / (draft seconds + step(rows))",
        "context": context,
        "steps": [point.to_json() for point in curve.points],
        "budgets": [asdict(own) for own in prices],
        "best_budget": best.budget,
        "by_users": users,
        "predicted": best.speedup,
        "measured": None if measured is None else {**asdict(measured), "speedup": measured.speedup},
    }
    seen = f"{best.speedup:.2f}x predicted with {best.budget} nodes"
    if measured is not None:
        seen += f", {measured.speedup:.2f}x measured"
    seen += f"; breaks even at tau {best.break_even:.2f}, and has {best.tau:.2f}"
    check = CheckResult(name=name, findings=tuple(found), seen=seen, figures={"best": best.budget})
    return SpeedResult(check=check, table=table)


def _budgets(exam: Exam) -> list[int]:
    """Budgets to try, the one in use among them, as far as exact mode allows."""
    most = exam.patient.target.exactness.max_nodes
    wanted = {*(_QUICK_BUDGETS if exam.config.is_quick else _BUDGETS), exam.config.tree_budget}
    return sorted(budget for budget in wanted if most is None or budget <= most)


def _rounds(exam: Exam, budget: int) -> Replay:
    drafter = exam.patient.drafter
    if drafter is None:
        return Replay()
    config = ReplayConfig(
        budget=budget,
        depth=min(exam.config.depth, budget),
        is_single=True,
        places=6 if exam.config.is_quick else 16,
    )
    return replay(drafter, exam.traces, config, clock=exam.clock)


def _run_of(budget: int, run: Replay) -> BudgetRun:
    return BudgetRun(
        budget=budget,
        tau=max(1.0, run.tau),
        draft_seconds=run.draft_seconds,
        rows=tuple(1 + place.nodes for place in run.places),
    )


def _by_users(run: BudgetRun, curve: Profile, context: int) -> list[dict[str, Any]]:
    """The speed-up with several users, at the most (see `price`)."""
    found = []
    for users in _USERS:
        own = price(run, lambda rows: seconds_for(curve, rows, context), requests=users)
        is_inside = is_measured(curve, users * max(run.rows), context)
        found.append({"users": users, "speedup": own.speedup, "measured": is_inside})
    return found


def _tau_bound(exam: Exam, run: Replay) -> float:
    """Tau at the upper end of its 95 % interval."""
    interval = bootstrap_tau(run.records(exam.traces))
    return run.tau if interval is None else interval[1]


def _findings(
    exam: Exam,
    prices: Sequence[Price],
    best: Price,
    users: Sequence[dict[str, Any]],
    *,
    high: float,
) -> list[Finding]:
    found = []
    verify = best.round_seconds - best.draft_seconds
    parts = (
        f"a round takes {1000 * best.round_seconds:.1f} ms ({1000 * best.draft_seconds:.1f} draft, "
        f"{1000 * verify:.1f} step of {best.mean_rows:.1f} rows), a plain step "
        f"{1000 * best.plain_seconds:.1f} ms"
    )
    evidence = (
        f"with {best.budget} nodes tau is {best.tau:.2f} and breaks even at {best.break_even:.2f}; "
        f"{parts}"
    )
    if best.speedup < _WORTH:
        is_certain = high < best.break_even and exam.patient.trained is not None
        found.append(
            Finding(
                severity=Severity.PROBLEM if is_certain else Severity.WARNING,
                what=f"drafting does not pay here: {best.speedup:.2f}x at best",
                evidence=evidence,
                advice=_advice(exam, best),
            )
        )
    if best.draft_seconds > verify:
        found.append(
            Finding(
                severity=Severity.WARNING,
                what="the draft takes longer than the target's own step",
                evidence=parts,
                advice="use a smaller draft, or another dtype for it",
            )
        )
    now = next((own for own in prices if own.budget == exam.config.tree_budget), best)
    if best.speedup > max(_WORTH, _BETTER * now.speedup):
        found.append(
            Finding(
                severity=Severity.NOTE,
                what=f"a tree budget of {best.budget} is better than {now.budget}",
                evidence=f"{best.speedup:.2f}x against {now.speedup:.2f}x predicted",
                advice=f"use --tree-budget {best.budget}",
            )
        )
    losing = next((own for own in users if own["speedup"] < 1), None)
    if losing is not None and losing["users"] > 1:
        found.append(
            Finding(
                severity=Severity.NOTE,
                what=f"with {losing['users']} users at once drafting stops paying",
                evidence=", ".join(f"{own['users']}: {own['speedup']:.2f}x" for own in users)
                + " at the most",
                advice="use a smaller --tree-budget there; auto-off guards against a loss",
            )
        )
    return found


def _advice(exam: Exam, best: Price) -> str:
    if best.draft_seconds > 0.5 * best.round_seconds:
        return "the draft is too slow for this target: use a smaller one, lookup, or none"
    rows = (best.round_seconds - best.draft_seconds) / best.plain_seconds
    if rows > 1.5:
        return "rows are dear on this machine: try other --threads or --dtype, else --draft none"
    if exam.patient.trained is None:
        return "use a draft trained for this target, or --draft none"
    return "acceptance is too low: see the other findings, else use --draft none"


def measured_run(exam: Exam, budget: int) -> MeasuredRun | None:
    """Decode some of the prompts plainly and with the draft, taking turns.

    Args:
        exam: The pair.
        budget: Drafted nodes of a round.

    Returns:
        What was measured, or None if the answers were too short.
    """
    target, drafter = exam.patient.target, exam.patient.drafter
    config = EngineConfig(max_batch=1, auto_off=False, limits=RoundLimits(keep_rounds=True))
    engines = [Engine(target, config=config), Engine(target, drafter=drafter, config=config)]
    tokens, seconds, rounds, rest = [0, 0], [0.0, 0.0], [0, 0], 0.0
    params = SamplingParams(
        max_tokens=exam.config.max_tokens, depth=min(exam.config.depth, budget), tree_budget=budget
    )
    shown = exam.traces[: 2 if exam.config.is_quick else 4]
    for turn, trace in enumerate([shown[0], *shown]):
        prompt = list(trace.tokens[: trace.prompt_length])
        for kind, engine in enumerate(engines):
            own = params if turn else replace(params, max_tokens=8)
            stats = engine.generate([prompt], own)[0].stats
            if not turn:  # warms up
                continue
            tokens[kind] += stats.committed
            rounds[kind] += stats.rounds
            seconds[kind] += stats.seconds_draft + stats.seconds_verify + stats.seconds_rest
            rest += stats.seconds_rest if kind else 0.0
    if not all(tokens) or not all(seconds):
        return None
    return MeasuredRun(
        budget=budget,
        plain=tokens[0] / seconds[0],
        drafted=tokens[1] / seconds[1],
        tau=tokens[1] / rounds[1],
        rest=rest / rounds[1],
    )
