"""A profile's seconds, corrected by what forwards took."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dspark.eval.profile import Profile, ProfilePoint
from dspark.eval.profile_costs import costs_of
from dspark.payoff import RoundCosts
from dspark.seen_costs import SeenCosts

STEPS = {1: 1.0, 2: 1.02, 4: 1.1, 8: 1.2, 9: 1.6, 16: 1.8, 32: 3.0}  # a step behind 8 rows


def profiled(rows: int) -> float:
    return float(np.interp(rows, list(STEPS), list(STEPS.values())))


def curve(first: int, count: int) -> np.ndarray:
    return np.array([profiled(rows) for rows in range(first, first + count)])


def true_seconds(requests: int, rows: int) -> float:
    """A machine with faster memory than the profile's, dearer rows, and contexts that cost."""
    return 0.7 + 1.2 * (profiled(rows) - 1) + 0.02 * (requests - 1)


def watched(seed: int, *, outliers: bool = False) -> SeenCosts:
    rng, seen = random.Random(seed), SeenCosts()
    for i in range(400):
        requests = rng.choice([1, 4, 8])
        rows = requests + rng.randrange(16)
        seconds = true_seconds(requests, rows) * rng.uniform(0.95, 1.05)
        if outliers and i % 10 == 0:
            seconds *= 50
        seen.record(requests, 1.0, profiled(rows), seconds)
    return seen


def test_before_anything_was_seen_the_profile_is_right() -> None:
    np.testing.assert_allclose(SeenCosts().seconds(6, 1.0, curve(6, 20)), curve(6, 20))


@pytest.mark.parametrize("seed", range(5))
def test_what_forwards_take_is_learned_and_the_steps_of_the_curve_stay(seed: int) -> None:
    seen = watched(seed)
    for requests in (1, 4, 8):
        found = seen.seconds(requests, 1.0, curve(requests, 16))
        expected = [true_seconds(requests, requests + n) for n in range(16)]
        np.testing.assert_allclose(found, expected, rtol=0.06)
    jump = np.diff(seen.seconds(1, 1.0, curve(8, 2)))
    assert jump == pytest.approx(1.2 * 0.4, rel=0.25)


def test_a_forward_that_waited_for_another_program_counts_as_one_twice_as_slow() -> None:
    found = watched(0, outliers=True).seconds(4, 1.0, curve(4, 8))
    expected = np.array([true_seconds(4, 4 + n) for n in range(8)])
    assert (found < 1.25 * expected).all()
    assert (found > 0.95 * expected).all()


def test_what_was_seen_fades() -> None:
    seen = watched(0)
    for i in range(400):
        rows = 1 + i % 16
        seen.record(1, 1.0, profiled(rows), profiled(rows))
    np.testing.assert_allclose(seen.seconds(1, 1.0, curve(1, 16)), curve(1, 16), rtol=0.03)


def test_contexts_that_seem_to_save_time_leave_the_rest_exact() -> None:
    """With 4 requests all the time and a faster machine, c would fall below 0 with a too high."""
    seen = SeenCosts()
    for i in range(200):
        rows = 4 + i % 16
        seen.record(4, 1.0, profiled(rows), 0.6 * profiled(rows))
    assert seen.factors[2] == 0
    np.testing.assert_allclose(seen.seconds(4, 1.0, curve(4, 16)), 0.6 * curve(4, 16), rtol=0.02)


def test_absurd_forwards_leave_costs_above_nothing() -> None:
    seen = SeenCosts()
    for i in range(100):
        rows = 1 + i % 32
        seen.record(1, 1.0, profiled(rows), 1e-6 if rows > 16 else 5.0)
    assert (seen.seconds(1, 1.0, curve(1, 32)) > 0).all()


def measured_profile() -> Profile:
    points = tuple(
        ProfilePoint(context=64, rows=n, requests=1, median=s, low=s, high=s, repeats=3)
        for n, s in STEPS.items()
    )
    return Profile(header={}, key={}, settings={}, points=points)


def test_a_measured_profile_is_corrected_and_a_function_taken_at_its_word() -> None:
    profile = measured_profile()
    measured, stated = RoundCosts(costs_of(profile)), RoundCosts(lambda rows, _: profiled(rows))
    for costs in (measured, stated):
        for i in range(200):
            rows = 4 + i % 16
            costs.record(rows, true_seconds(4, rows), requests=4, context=64)
    expected = np.array([true_seconds(4, 4 + n) for n in range(8)])
    found = measured.rates(4, 64, with_overhead=True, requests=4)(7)
    np.testing.assert_allclose(found, 1 / expected, rtol=0.03)
    np.testing.assert_allclose(
        stated.rates(4, 64, with_overhead=True, requests=4)(7), 1 / curve(4, 8)
    )
    # Where a seed's text may depend on no measured time, the profile stays what it was.
    alone = measured.rates(4, 64, with_overhead=False, requests=4)(7)
    np.testing.assert_allclose(alone, 1 / curve(4, 8))
