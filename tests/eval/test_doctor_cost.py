"""The cost model: a pure function, so every figure is known."""

from __future__ import annotations

import pytest

from dspark.errors import ConfigError
from dspark.eval.doctor.cost import BudgetRun, best_price, price, price_all


def step(rows: float) -> float:
    """20 ms and 1 ms a row."""
    return 0.020 + 0.001 * rows


def run(budget: int, tau: float, draft: float, *rows: int) -> BudgetRun:
    return BudgetRun(budget=budget, tau=tau, draft_seconds=draft, rows=rows or (budget + 1,))


def test_the_speed_up_is_tau_times_plain_over_the_round() -> None:
    found = price(run(9, 3.0, 0.012), step)
    assert found.plain_seconds == pytest.approx(0.021)
    assert found.round_seconds == pytest.approx(0.012 + 0.030)
    assert found.speedup == pytest.approx(3.0 * 21 / 42)
    assert found.break_even == pytest.approx(2.0)


def test_at_the_break_even_tau_drafting_is_as_fast_as_plain() -> None:
    found = price(run(9, 3.0, 0.012), step)
    assert price(run(9, found.break_even, 0.012), step).speedup == pytest.approx(1.0)


def test_plain_decoding_costs_what_it_costs() -> None:
    assert price(run(0, 1.0, 0.0), step).speedup == pytest.approx(1.0)


def test_rounds_of_different_sizes_are_priced_one_by_one() -> None:
    """A cliff between the sizes would be missed by the price of the mean."""

    def cliff(rows: float) -> float:
        return 0.01 if rows <= 8 else 0.05

    found = price(run(15, 2.0, 0.0, 1, 1, 1, 16), cliff)
    assert found.mean_rows == 4.75
    assert found.round_seconds == pytest.approx(0.02)


def test_with_more_users_rows_weigh_more() -> None:
    speeds = [price(run(9, 3.0, 0.012), step, requests=users).speedup for users in (1, 4, 16)]
    assert speeds[1] == pytest.approx(3.0 * 24 / (12 + 60))
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[-1] < 1


def test_the_best_budget_has_the_highest_speed_up_and_of_near_equals_the_fewest_nodes() -> None:
    prices = price_all([run(3, 2.0, 0.0), run(7, 2.9, 0.0), run(31, 3.0, 0.0)], step)
    assert best_price(prices).budget == 7
    flat = price_all([run(7, 2.01, 0.0), run(3, 2.0, 0.0)], lambda rows: 0.01)
    assert best_price(flat).budget == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.9}, "tau must be >= 1"),
        ({"tau": float("nan")}, "tau must be >= 1"),
        ({"draft_seconds": -1.0}, "seconds >= 0"),
        ({"rows": ()}, "at least one row"),
        ({"rows": (4, 0)}, "at least one row"),
    ],
)
def test_rounds_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    values = {"budget": 3, "tau": 2.0, "draft_seconds": 0.0, "rows": (4,), **options}
    with pytest.raises(ConfigError, match=message):
        BudgetRun(**values)


def test_prices_without_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="requests is 0"):
        price(run(3, 2.0, 0.0), step, requests=0)
    with pytest.raises(ConfigError, match="takes no time"):
        price(run(3, 2.0, 0.0), lambda rows: 0.0)
    with pytest.raises(ConfigError, match="no price"):
        best_price([])
