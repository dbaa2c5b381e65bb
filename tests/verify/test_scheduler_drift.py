"""The online correction: what it learns, from whom, how it is bounded and told."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from dspark.tree import DraftTree
from dspark.verify.scheduler import Load, Offer, Scheduler
from dspark.verify.scheduler_drift import Drift, Outcome
from tests.verify.scheduling import chain_of, load_of, masks, tree_of


def played(
    rng: np.random.Generator,
    tree: DraftTree,
    chance: float,
    *,
    is_drawn: bool = False,
    who: int = 0,
) -> Outcome:
    """A chain each of whose steps is accepted with this chance."""
    accepted = 0
    while accepted < tree.num_nodes and rng.random() < chance:
        accepted += 1
    return Outcome(who, is_drawn, tree, accepted)


def believed(drift: Drift, tree: DraftTree, *, is_drawn: bool = False, who: int = 0) -> np.ndarray:
    return np.array(drift.correct([(who, is_drawn)], [tree], tree.survival.tolist()))


STATED = [0.9**depth for depth in range(1, 6)]


@pytest.mark.parametrize("seed", range(3))
def test_an_overstated_step_is_corrected_at_every_depth(seed: int) -> None:
    rng, drift = np.random.default_rng(seed), Drift()
    tree = chain_of(*STATED)
    for request in range(600):
        drift.observe([played(rng, tree, 0.6, who=request)])
    true = [0.6**depth for depth in range(1, 6)]
    np.testing.assert_allclose(believed(drift, tree, who=-1), true, atol=0.09)


def test_an_understated_survival_is_raised_but_never_above_one_or_the_parent() -> None:
    rng, drift = np.random.default_rng(0), Drift()
    tree = tree_of([-1, -1, 0, 2], [0.5, 0.4, 0.5, 0.5])
    for _ in range(400):
        drift.observe([played(rng, chain_of(0.5, 0.25, 0.125), 0.97)])
    values = believed(drift, tree)
    assert values[0] > 0.9
    assert (values <= 1).all()
    assert values[2] <= values[0]
    assert values[3] <= values[2]
    assert values[3] > 0.6
    steep = believed(drift, chain_of(0.5, 0.5, 0.5))  # which alone would be .9, 1.8 and 3
    assert (steep == steep[0]).all()
    assert believed(drift, chain_of(0.9)).tolist() == [1.0]


def test_a_calibrated_draft_is_left_alone() -> None:
    rng, drift = np.random.default_rng(1), Drift()
    tree = chain_of(*[0.8**depth for depth in range(1, 4)])
    for _ in range(300):
        drift.observe([played(rng, tree, 0.8)])
    corrected = believed(drift, tree)
    np.testing.assert_allclose(corrected, tree.survival, rtol=0.25)
    assert corrected[0] == tree.survival[0]


def test_older_rounds_fade() -> None:
    rng, drift = np.random.default_rng(2), Drift()
    tree = chain_of(0.5)
    for chance in (0.05, 0.95):
        for _ in range(1500):
            drift.observe([played(rng, tree, chance)])
    assert believed(drift, tree)[0] > 0.85


@pytest.mark.parametrize("is_drawn", [False, True])
def test_a_draft_of_which_nothing_is_verified_any_more_gets_another_chance(is_drawn: bool) -> None:
    drift, tree = Drift(), chain_of(0.9)
    drift.observe([Outcome(0, is_drawn, tree, 0) for _ in range(300)])
    assert believed(drift, tree, is_drawn=is_drawn)[0] < 0.12
    for _ in range(25):
        drift.observe([Outcome(0, is_drawn, DraftTree.empty(), 0)])
    assert believed(drift, tree, is_drawn=is_drawn)[0] > 0.7


def test_requests_that_do_better_than_others_are_told_apart() -> None:
    rng, drift = np.random.default_rng(5), Drift()
    tree = chain_of(0.5, 0.25)
    for _ in range(60):
        drift.observe([played(rng, tree, chance, who=who) for who, chance in ((1, 0.1), (2, 0.8))])
    assert believed(drift, tree, who=1)[0] < 0.25
    assert believed(drift, tree, who=2)[0] > 0.65
    newcomer = believed(drift, tree, who=3)[0]
    assert newcomer == pytest.approx(0.45, abs=0.12)  # what all showed together
    drift.release(1)
    assert believed(drift, tree, who=1)[0] == newcomer


def test_while_others_are_verified_what_is_cut_to_nothing_takes_no_evidence_away() -> None:
    drift, tree = Drift(), chain_of(0.9)
    for _ in range(300):
        drift.observe([Outcome(0, False, tree, 0), Outcome(1, False, DraftTree.empty(), 0)])
    assert believed(drift, tree)[0] < 0.1


def test_drawn_requests_learn_from_their_own_rounds_alone() -> None:
    """Another request with the same seed has the same noise: its outcome would tell of tokens."""
    rng, drift = np.random.default_rng(3), Drift()
    tree = chain_of(0.9, 0.8)
    for _ in range(200):
        drift.observe([played(rng, tree, 0.1, is_drawn=True, who=1)])
    assert believed(drift, tree, is_drawn=True, who=1)[0] < 0.3
    assert believed(drift, tree, is_drawn=True, who=2).tolist() == tree.survival.tolist()
    assert believed(drift, tree, who=1).tolist() == tree.survival.tolist()
    drift.release(1)
    for who in (1, 2, 3, 4):  # one of them gets the row that is free now
        assert believed(drift, tree, is_drawn=True, who=who).tolist() == tree.survival.tolist()


def test_many_drawn_requests_are_told_apart() -> None:
    rng, drift = np.random.default_rng(3), Drift()
    tree = chain_of(0.5)
    for _ in range(150):
        drift.observe(
            [played(rng, tree, 0.1 + 0.08 * who, is_drawn=True, who=who) for who in range(11)]
            + [played(rng, tree, 0.5, who=99)]
        )
    own = [float(believed(drift, tree, is_drawn=True, who=who)[0]) for who in range(11)]
    np.testing.assert_allclose(own, [0.1 + 0.08 * who for who in range(11)], atol=0.2)
    assert own[0] < 0.25
    assert own[10] > 0.75
    assert believed(drift, tree, who=99)[0] == pytest.approx(0.5, abs=0.06)


def test_a_path_deeper_than_the_record_counts_in_full() -> None:
    drift, tree = Drift(), chain_of(*[1.0] * 40)
    for _ in range(50):
        drift.observe([Outcome(0, False, tree, 40)])
    assert believed(drift, tree).tolist() == tree.survival.tolist()
    for _ in range(200):
        drift.observe([Outcome(0, False, tree, 35)])
    values = believed(drift, tree)
    assert values[30] == 1.0
    assert values[39] < 0.7


def test_the_scheduler_goes_by_what_was_accepted() -> None:
    rng, scheduler = np.random.default_rng(4), Scheduler()
    tree = chain_of(0.95, 0.9, 0.85, 0.8)
    offer, load = Offer(request_id=0, tree=tree), load_of([1.0, 1.3, 1.6, 1.9, 2.2])
    assert masks([offer], scheduler.plan([offer], load))[0].all()
    for _ in range(100):
        scheduler.observe([played(rng, tree, 0.2)])
    (cut,) = scheduler.plan([offer], load)
    assert not cut.keep.any()
    assert cut.first < 0.4


@pytest.mark.parametrize("schedule", ["threshold:0.5", "fixed:2", "off"])
def test_schedules_to_compare_with_do_not_learn(schedule: str) -> None:
    from dspark.verify.scheduler_setting import Schedule

    rng, scheduler = np.random.default_rng(4), Scheduler(Schedule.parse(schedule))
    tree = chain_of(0.9, 0.8)
    for _ in range(100):
        scheduler.observe([played(rng, tree, 0.01)])
    (cut,) = scheduler.plan([Offer(request_id=0, tree=tree)], Load(1.0, None))
    assert cut.first == 0.9
    assert cut.keep is None


def test_a_change_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    tree, drift = chain_of(0.9), Drift()
    with caplog.at_level(logging.INFO, logger="dspark"):
        for _ in range(2000):
            drift.observe([Outcome(0, False, tree, 0)])
        told = len(caplog.records)
        # From 1 down to 6 / (180 + 6) in steps of a fifth at the least.
        assert 10 <= told <= np.log(6 / 186) / np.log(1 / 1.2)
        for _ in range(500):
            drift.observe([Outcome(0, False, tree, 0)])
        assert len(caplog.records) == told
    assert "depth 1" in caplog.text
    assert "greedy" in caplog.text
