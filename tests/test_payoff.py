"""The measured cost of a forward, and the switch that stops drafting while it loses."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from dspark.payoff import FirstNode, PayoffSwitch, RoundCosts, StepClock


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


def drafted_share(law: list[float], extra: float) -> float:
    """Share of rounds with drafts where 1, 2, 3, 5 tokens are committed by this law."""
    on = 0
    for seed in range(10):
        rng, switch = random.Random(seed), PayoffSwitch()
        for _ in range(1000):
            if switch.is_on:
                on += 1
                switch.drafted(rng.choices([1, 2, 3, 5], law)[0], extra, 1.0)
            else:
                switch.skipped()
    return on / 10_000


def test_chance_seldom_stops_drafting_that_gains_and_does_not_save_what_loses() -> None:
    uneven, rare = [0.75, 0.15, 0.06, 0.04], [0.95, 0.04, 0.01, 0.0]  # 1.43 and 1.06 tokens
    assert drafted_share(uneven, 0.15) > 0.95
    assert drafted_share(uneven, 0.3) > 0.7
    assert drafted_share(rare, 0.15) < 0.2
    assert drafted_share(rare, 0.6) < 0.05


def test_six_rounds_alike_are_no_certainty() -> None:
    """A token in seven rounds would make up for an eighth of a step: six without one say little."""
    switch = PayoffSwitch()
    assert len(run(switch, 6, committed=1, extra=0.125)) == 6
    assert switch.is_on
    run(switch, 30, committed=1, extra=0.125)
    assert switch.off_count > 0


def test_a_switch_that_is_not_allowed_never_switches() -> None:
    switch = PayoffSwitch(allowed=False)
    assert len(run(switch, 300, committed=1, extra=9.0)) == 300
    assert switch.off_count == 0


def test_without_a_measured_plain_step_nothing_is_decided() -> None:
    switch = PayoffSwitch()
    for _ in range(50):
        switch.drafted(1, 1.0, 0.0)
    assert switch.is_on


# -- costs of a round ------------------------------------------------------------------------------


def test_a_profile_is_read_as_it_is_and_once() -> None:
    asked = []

    def jagged(rows: int, context: int) -> float:
        asked.append((rows, context))
        return 1.0 + rows % 3 + context / 1000

    costs = RoundCosts(jagged)
    assert costs.is_known
    assert not costs.wants_plain(1)
    seconds = costs.forwards(4, 5, 1000)
    context = asked[0][1]
    assert 950 <= context <= 1050
    assert seconds.tolist() == [1.0 + rows % 3 + context / 1000 for rows in range(4, 9)]
    assert len(asked) == 5
    costs.forwards(6, 4, 1020)  # much the same context
    assert asked[5:] == [(9, context)]
    costs.forwards(6, 1, 2000)
    assert len(asked) == 7
    assert asked[-1][0] == 6


def test_a_profile_is_not_kept_for_every_context_there_ever_was() -> None:
    asked = []
    costs = RoundCosts(lambda rows, context: asked.append(context) or 1.0)
    for turn in range(2):
        for power in range(40):
            costs.forwards(1, 1, 2**power)
        assert len(asked) == 40 * (turn + 1)


def test_without_a_profile_the_clock_gives_the_costs() -> None:
    costs = RoundCosts()
    assert costs.rates(1, 10, with_overhead=True) is None
    for i in range(60):
        costs.record(1 + i % 16, line(1 + i % 16))
    np.testing.assert_allclose(costs.forwards(3, 20, 10), [line(r) for r in range(3, 23)])
    rates = costs.rates(3, 10, with_overhead=True)
    np.testing.assert_allclose(rates(4), [1 / line(r) for r in range(3, 8)])


@pytest.mark.parametrize("slope", [-0.001, 0.0, 0.004])
def test_a_line_of_costs_is_what_single_readings_give(slope: float) -> None:
    clock = StepClock()
    assert clock.line(2, 3).tolist() == [0.0] * 3
    for i in range(40):
        clock.record(50 + i % 16, max(1e-4, slope * (i % 16)))
    np.testing.assert_allclose(clock.line(1, 70), [clock.seconds(r) for r in range(1, 71)])


def test_what_a_round_takes_besides_its_forward_flattens_the_rates() -> None:
    costs = RoundCosts(lambda rows, context: float(rows))
    assert costs.asking == costs.overhead == 0
    costs.record_overhead(50.0, 10.0, 1)  # the draft read the prompt
    for _ in range(6):
        costs.record_overhead(4.0, 1.0, 2)
    assert costs.overhead == 5.0
    assert costs.asking == 2.0
    assert costs.rates(1, 10, with_overhead=True)(2).tolist() == [1 / 6, 1 / 7, 1 / 8]
    assert costs.rates(1, 10, with_overhead=False)(2).tolist() == [1, 1 / 2, 1 / 3]


def test_what_drafted_rounds_take_more_than_plain_ones_is_the_price_of_drafting() -> None:
    costs = RoundCosts(lambda rows, context: float(rows))
    for _ in range(20):
        costs.record_overhead(0.0, 3.0, 0)
        costs.record_overhead(4.0, 5.0, 2)
    assert costs.overhead == 9.0
    assert costs.asking == (4 + 5 - 3) / 2
    for _ in range(20):
        costs.record_overhead(4.0, 2.0, 2)  # never less than drafting itself
    assert costs.asking == 2.0


def test_the_time_of_prompt_rows_makes_no_token_worth_more() -> None:
    costs = RoundCosts(lambda rows, context: 10.0 + rows)
    alone = costs.rates(2, 10, with_overhead=False)(3)
    np.testing.assert_allclose(alone, 1 / np.array([12.0, 13, 14, 15]))
    beside = costs.rates(2, 10, with_overhead=False, prompt_rows=100)(3)
    np.testing.assert_allclose(beside, alone)
    costs.record_overhead(1.0, 4.0, 1)
    beside = costs.rates(2, 10, with_overhead=True, prompt_rows=100)(3)
    np.testing.assert_allclose(beside, 1 / np.array([17.0, 18, 19, 20]))


def test_beside_prompts_nodes_cost_what_they_do_on_top_of_them() -> None:
    # Rows are free up to eight, dear above, and a curve may fall.
    seconds = {2: 4.0, 7: 4.0, 8: 4.0, 9: 9.0, 10: 1.0}
    costs = RoundCosts(lambda rows, context: seconds[rows])
    beside = costs.rates(2, 10, with_overhead=False, prompt_rows=5)(3)
    np.testing.assert_allclose(beside, 1 / np.array([4.0, 4, 9, 4]))


# -- the first node --------------------------------------------------------------------------------


def drafted(first: FirstNode, rounds: int, survival: float, bar: float) -> list[int]:
    """Numbers of the rounds that draft, all proposals being alike."""
    numbers = []
    for number in range(rounds):
        if first.pays(bar):
            numbers.append(number)
            first.offered(survival)
    return numbers


def test_a_first_node_that_does_not_pay_is_probed_ever_more_rarely() -> None:
    numbers = drafted(FirstNode(), 600, 0.2, 0.3)
    assert numbers[:4] == [0, 1, 2, 3]
    pauses = [b - a - 1 for a, b in itertools.pairwise(numbers) if b - a > 1]
    assert pauses[:4] == [8, 16, 32, 64]
    assert set(pauses[4:]) == {64}


@pytest.mark.parametrize(("gain", "price", "is_worth_it"), [(0.2, 0.1, True), (0.05, 0.1, False)])
def test_drafting_stops_where_it_takes_longer_than_its_nodes_gain(
    gain: float, price: float, is_worth_it: bool
) -> None:
    first, rounds = FirstNode(), 0
    for number in range(400):
        if first.pays(0.3, price):
            rounds += 1
            first.offered(0.9, gain * 4 if number % 4 == 0 else 0.0)  # one of four gains
    assert rounds == 400 if is_worth_it else rounds < 40


def test_a_first_node_that_pays_is_drafted_in_every_round() -> None:
    assert len(drafted(FirstNode(), 100, 0.4, 0.3)) == 100
    assert len(drafted(FirstNode(), 100, 0.01, 0.0)) == 100


def test_a_lower_bar_is_noticed_at_once_and_pauses_begin_anew() -> None:
    first = FirstNode()
    drafted(first, 300, 0.2, 0.3)
    assert drafted(first, 5, 0.2, 0.1) == [0, 1, 2, 3, 4]
    numbers = drafted(first, 20, 0.2, 0.3)
    assert numbers == [8]


def test_one_good_proposal_of_the_last_four_is_enough() -> None:
    first = FirstNode()
    for survival in (0.9, 0.1, 0.1, 0.1):
        first.offered(survival)
    assert first.pays(0.5)
    first.offered(0.1)
    assert not first.pays(0.5)
