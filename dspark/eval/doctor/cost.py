"""The cost model: does drafting pay, with which budget, and what acceptance breaks even?

Per round of drafted decoding, for c requests at once:

    round seconds = draft seconds + step(c * rows)
    plain seconds = step(c)
    speed-up      = tau * plain seconds / round seconds

step(B) is the measured seconds of a step of B rows (dspark/eval/profile.py); rows are the anchor
and the drafted nodes of a request; tau is committed tokens per round, closing token included. A
round commits tau tokens where a plain step commits one, so drafting breaks even at

    tau = round seconds / plain seconds

What a round takes besides (trees, sampling, text) is about the same with and without drafting and
is left out. Where trees differ in size from round to round, step is averaged over the rounds.

**Source:** DSpark, arXiv 2607.05147, section 3.2.2 (tau x SPS(B)); Leviathan et al. 2023, theorem
3.8, for chains and constant costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dspark.errors import ConfigError

__all__ = ["BudgetRun", "Price", "Step", "best_price", "price", "price_all"]

_NEAR = 0.99

Step: TypeAlias = Callable[[float], float]
"""Rows of a step -> its seconds, > 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetRun:
    """What rounds with one tree budget did.

    Attributes:
        budget: Drafted nodes of a round at the most.
        tau: Committed tokens per round, >= 1.
        draft_seconds: Seconds of the drafter per round, >= 0.
        rows: Rows of each round, anchor included; one or more.

    Raises:
        ConfigError: If a value is out of range.
    """

    budget: int
    tau: float
    draft_seconds: float
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.tau >= 1 or not self.draft_seconds >= 0:
            raise ConfigError(
                f"a round with tau {self.tau} and {self.draft_seconds} s of drafting has no price: "
                "tau must be >= 1, seconds >= 0."
            )
        if not self.rows or min(self.rows) < 1:
            raise ConfigError("a round needs at least one row to have a price.")

    @property
    def mean_rows(self) -> float:
        """Rows of a round on average."""
        return sum(self.rows) / len(self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What the cost model says of a budget.

    Attributes:
        budget: Drafted nodes of a round at the most.
        tau: As measured.
        mean_rows: Rows of a round on average.
        draft_seconds: Of a round.
        round_seconds: Drafting and the step.
        plain_seconds: A step of plain decoding.
        speedup: Tokens per second over those of plain decoding.
        break_even: The tau at which the speed-up is 1.
    """

    budget: int
    tau: float
    mean_rows: float
    draft_seconds: float
    round_seconds: float
    plain_seconds: float
    speedup: float
    break_even: float


def price(run: BudgetRun, step: Step, *, requests: int = 1) -> Price:
    """Apply the cost model (see the module).

    Args:
        run: Rounds with one budget.
        step: Seconds of a step.
        requests: Requests that decode at once, each with such rounds; the drafter is taken to need
            as long for all of them as for one, so that for several the speed-up is a bound from
            above.

    Returns:
        The price.

    Raises:
        ConfigError: If requests is below 1, or a step takes no time.
    """
    if requests < 1:
        raise ConfigError(f"requests is {requests}, but must be >= 1.")
    plain = step(requests)
    verify = sum(step(requests * rows) for rows in run.rows) / len(run.rows)
    if not plain > 0 or not verify > 0:
        raise ConfigError("a step that takes no time has no price.")
    whole = run.draft_seconds + verify
    return Price(
        budget=run.budget,
        tau=run.tau,
        mean_rows=run.mean_rows,
        draft_seconds=run.draft_seconds,
        round_seconds=whole,
        plain_seconds=plain,
        speedup=run.tau * plain / whole,
        break_even=whole / plain,
    )


def price_all(runs: Sequence[BudgetRun], step: Step, *, requests: int = 1) -> list[Price]:
    """The price of every budget; see `price`."""
    return [price(run, step, requests=requests) for run in runs]


def best_price(prices: Sequence[Price]) -> Price:
    """The price of highest speed-up; of those within 1 % of it, the smallest budget.

    Raises:
        ConfigError: If there is none.
    """
    if not prices:
        raise ConfigError("there is no price to choose from.")
    highest = max(own.speedup for own in prices)
    near = [own for own in prices if own.speedup >= _NEAR * highest]
    return min(near, key=lambda own: own.budget)
