"""The measured cost of a forward, and the switch that stops drafting while it loses."""

from __future__ import annotations

import itertools
import random

import pytest

from dspark.payoff import PayoffSwitch, StepClock


def line(rows: float) -> float:
    return 0.020 + 0.0005 * rows


def trained(seed: int, *, outliers: bool = False) -> StepClock:
    rng, clock = random.Random(seed), StepClock()
    for i in range(300):
        rows = rng.choice([1, 2, 8, 16, 32])
        seconds = line(rows) * rng.uniform(0.9, 1.1)
        if outliers and i > 20 and i % 10 == 0:
            seconds *= 50
        clock.record(rows, seconds)
    return clock


@pytest.mark.parametrize("seed", range(5))
def test_the_line_is_recovered_from_noisy_samples(seed: int) -> None:
    """10 % noise; the 50 or so samples that count leave some 2 % and 15 % of it."""
    clock = trained(seed)
    assert clock.is_known
    assert clock.slope == pytest.approx(0.0005, rel=0.35)
    for rows in (1, 8, 32):
        assert clock.seconds(rows) == pytest.approx(line(rows), rel=0.06)


@pytest.mark.parametrize("seed", range(5))
def test_outliers_are_clipped(seed: int) -> None:
    """Every tenth step takes 50 times as long: unclipped, the mean would be 6 times too high."""
    clock = trained(seed, outliers=True)
    assert clock.seconds(8) < 1.3 * line(8)


def test_older_samples_fade() -> None:
    clock = trained(0)
    for i in range(400):
        rows = (1, 8, 32)[i % 3]
        clock.record(rows, 3 * line(rows))
    assert clock.seconds(8) == pytest.approx(3 * line(8), rel=0.05)


def test_nothing_is_known_from_one_row_count_and_a_plain_step_is_asked_for() -> None:
    clock = StepClock()
    assert (clock.seconds(4), clock.slope) == (0.0, 0.0)
    assert not clock.wants_plain(1)
    for _ in range(10):
        clock.record(16, 0.03)
    assert not clock.is_known
    assert clock.wants_plain(1)
    assert not clock.wants_plain(16)  # these were plain steps
    assert clock.seconds(16) == pytest.approx(0.03)
    clock.record(1, 0.02)
    assert clock.is_known
    assert not clock.wants_plain(1)
    assert clock.slope == pytest.approx(0.01 / 15)


def test_more_rows_never_cost_less_and_a_forward_never_nothing() -> None:
    clock = StepClock()
    for i in range(40):
        clock.record(1 + i % 16, 0.03 - 0.001 * (i % 16))
    assert clock.slope == 0.0
    rising = StepClock()
    for i in range(40):
        rising.record(50 + i % 16, 0.001 * (i % 16))
    assert rising.seconds(1) > 0


def run(switch: PayoffSwitch, rounds: int, committed: int, extra: float) -> list[int]:
    """Drive the switch as the engine does; the numbers of the rounds that drafted."""
    drafted = []
    for number in range(rounds):
        if switch.is_on:
            drafted.append(number)
            switch.drafted(committed, extra, 1.0)
        else:
            switch.skipped()
    return drafted


def test_drafting_stays_on_while_it_gains() -> None:
    switch = PayoffSwitch()
    assert len(run(switch, 500, committed=3, extra=1.0)) == 500
    assert switch.off_count == 0


def test_drafting_that_breaks_even_stays_on() -> None:
    switch = PayoffSwitch()
    assert len(run(switch, 100, committed=2, extra=1.0)) == 100


def test_drafting_stops_while_it_loses_and_is_tried_again_ever_more_rarely() -> None:
    switch = PayoffSwitch()
    drafted = run(switch, 2000, committed=1, extra=0.5)
    pauses = [b - a - 1 for a, b in itertools.pairwise(drafted) if b - a > 1]
    assert pauses[:5] == [16, 32, 64, 128, 256]
    assert set(pauses[5:]) == {256}
    assert drafted[:6] == list(range(6))
    assert switch.off_count in (len(pauses), len(pauses) + 1)


def test_drafting_that_gains_again_goes_on_and_forgets_the_long_pauses() -> None:
    switch = PayoffSwitch()
    run(switch, 300, committed=1, extra=0.5)
    while not switch.is_on:
        switch.skipped()
    assert len(run(switch, 50, committed=4, extra=0.5)) == 50
    losing = run(switch, 200, committed=1, extra=2.0)
    first = next(b - a - 1 for a, b in itertools.pairwise(losing) if b - a > 1)
    assert first == 16


def test_a_few_bad_rounds_do_not_stop_drafting_that_gains() -> None:
    switch = PayoffSwitch()
    run(switch, 40, committed=4, extra=0.5)
    assert len(run(switch, 4, committed=1, extra=0.5)) == 4
    assert switch.is_on


def test_a_switch_that_is_not_allowed_never_switches() -> None:
    switch = PayoffSwitch(allowed=False)
    assert len(run(switch, 300, committed=1, extra=9.0)) == 300
    assert switch.off_count == 0


def test_without_a_measured_plain_step_nothing_is_decided() -> None:
    switch = PayoffSwitch()
    for _ in range(50):
        switch.drafted(1, 1.0, 0.0)
    assert switch.is_on
