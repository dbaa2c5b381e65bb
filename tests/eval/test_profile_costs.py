"""A profile that counted experts, as what an engine asks for costs."""

from __future__ import annotations

import numpy as np
import pytest

from dspark.eval.profile import ExpertCount, Profile, ProfileKey, ProfilePoint, seconds_for
from dspark.eval.profile_costs import ExpertCosts, costs_of
from dspark.expert_reuse import PricesExperts
from dspark.seen_costs import MeasuredCosts

ROWS = (1, 2, 4, 8, 16, 32)
EXPERTS, CHOSEN = 64, 6


def woken(rows: int) -> float:
    """Distinct experts of rows that choose uniformly."""
    return EXPERTS * (1 - (1 - CHOSEN / EXPERTS) ** rows)


def profile_of(
    row: float, expert: float, *, noise: float = 0.0, has_experts: bool = True
) -> Profile:
    """Steps of a second, and so much more for every row and every expert woken beyond the first."""
    key = ProfileKey(
        target="t", device="cpu", processor="p", dtype="float32", threads=1, exact=False
    )
    rng = np.random.default_rng(1)

    def point(context: int, rows: int) -> ProfilePoint:
        seconds = 1 + row * (rows - 1) + expert * (woken(rows) - CHOSEN) + context / 1000
        seconds *= 1 + noise * rng.normal()
        return ProfilePoint(
            context=context,
            rows=rows,
            requests=1,
            median=seconds,
            low=seconds,
            high=seconds,
            repeats=3,
        )

    points = tuple(point(context, rows) for context in (64, 512) for rows in ROWS)
    counts = tuple(ExpertCount(rows=rows, distinct_experts=woken(rows)) for rows in ROWS)
    return Profile(key=key, points=points, experts=counts if has_experts else None)


@pytest.mark.parametrize(("row", "expert"), [(0.0, 0.02), (0.05, 0.02), (0.05, 0.0), (0.0, 0.0)])
def test_the_price_of_an_expert_is_found_beside_that_of_a_row(row: float, expert: float) -> None:
    assert ExpertCosts(profile_of(row, expert)).seconds_per_expert == pytest.approx(
        expert, abs=1e-9
    )


def test_prices_are_never_negative() -> None:
    """Steps that curve upwards, as if an expert made them shorter: rows are all there is."""
    assert ExpertCosts(profile_of(0.2, -0.02)).seconds_per_expert == 0
    assert ExpertCosts(profile_of(-0.02, 0.05)).seconds_per_expert > 0
    assert ExpertCosts(profile_of(-0.001, -0.002)).seconds_per_expert == 0


def test_a_jagged_profile_still_has_about_the_right_price() -> None:
    assert ExpertCosts(profile_of(0.01, 0.02, noise=0.03)).seconds_per_expert == pytest.approx(
        0.02, rel=0.3
    )


def test_counts_are_read_between_and_beyond_what_was_measured() -> None:
    costs = ExpertCosts(profile_of(0.0, 0.02))
    assert costs.woken(8) == pytest.approx(woken(8))
    assert costs.woken(3) == pytest.approx((woken(2) + woken(4)) / 2)
    assert costs.woken(100) == costs.woken(32) == pytest.approx(woken(32))


def test_seconds_are_the_profiles_and_dense_targets_have_no_prices() -> None:
    profile = profile_of(0.05, 0.02)
    costs = costs_of(profile)
    assert isinstance(costs, PricesExperts)
    assert costs(5, 100) == seconds_for(profile, 5, 100)
    dense = costs_of(profile_of(0.05, 0.02, has_experts=False))
    assert not isinstance(dense, PricesExperts)
    assert isinstance(dense, MeasuredCosts)
    assert not isinstance(dense, PricesExperts)
