"""The scheduler: optimal where it may be, and never looking at what a rule forbids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.errors import ConfigError
from dspark.request import Rule, SamplingParams
from dspark.tree import DraftTree, Proposal
from dspark.verify.noise import NoiseKey
from dspark.verify.rules import walk_rejection
from dspark.verify.scheduler import Load, Offer, Scheduler
from dspark.verify.scheduler_setting import Schedule
from dspark.verify.verifier import VerifyJob, verify
from tests.verify.scheduling import (
    best_theta,
    chain_of,
    closed_sets,
    is_closed,
    jagged,
    lines,
    load_of,
    masks,
    plan,
    rounds,
    theta,
    tree_of,
)

# -- appendix A of the DSpark paper ----------------------------------------------------------------

TARGET = np.array([0.7, 0.3])
DRAFT = np.array([0.5, 0.5])
APPENDIX = load_of([1 / rate for rate in (1.0, 0.5, 0.45)])


def appendix_tree(first: int) -> DraftTree:
    """Two tokens; .8 is the first one's acceptance, the second is certain after token 0 only."""
    second = 0.8 if first == 0 else 0.0
    return DraftTree.build([first, 0], [-1, 0], [0.8, second])


def law_of_the_first_token(schedule: str, *, is_drawn: bool = True) -> np.ndarray:
    """Exactly: over both drafts, and over uniforms in tenths, where the rule's decisions change."""
    law = np.zeros(2)
    for first, chance in enumerate(DRAFT):
        offer = Offer(request_id=0, tree=appendix_tree(first), is_drawn=is_drawn)
        (keep,) = plan(schedule, [offer], APPENDIX)
        proposal = Proposal(offer.tree, torch.from_numpy(DRAFT[None]), np.zeros(2, dtype=np.int64))
        for tenth in range(10):
            walk = walk_rejection(
                proposal.subtree(keep), lambda row: TARGET, lambda node, u=tenth: (u + 0.5) / 10
            )
            if walk.path:
                law[first] += chance / 10
            else:
                law += chance / 10 * walk.law / walk.law.sum()
    return law


def test_appendix_a_early_stop_keeps_the_law_of_the_rejection_rule() -> None:
    np.testing.assert_allclose(law_of_the_first_token("early-stop"), [0.7, 0.3], atol=1e-12)
    np.testing.assert_allclose(law_of_the_first_token("auto"), [0.7, 0.3], atol=1e-12)


def test_appendix_a_looking_back_bends_the_law_of_the_rejection_rule() -> None:
    """The same nodes, declared as not drawn so that they may be searched globally."""
    law = law_of_the_first_token("global", is_drawn=False)
    np.testing.assert_allclose(law, [0.85, 0.15], atol=1e-12)


@pytest.mark.parametrize("rule", [Rule.REJECTION, Rule.BLOCK])
def test_the_global_search_is_refused_for_rules_that_draw_from_laws(rule: Rule) -> None:
    with pytest.raises(ConfigError, match="'global' with rule"):
        Schedule.parse("global").check(rule)
    for name in ("auto", "early-stop", "async", "threshold:0.2", "fixed:3", "off"):
        Schedule.parse(name).check(rule)
    offer = Offer(request_id=0, tree=chain_of(0.5), is_drawn=True)
    with pytest.raises(ConfigError, match="drawn from laws"):
        plan("global", [offer], APPENDIX)


@pytest.mark.parametrize("rule", [Rule.COUPLED, Rule.SAMPLE_MATCH])
def test_appendix_a_looking_back_changes_no_token_where_tokens_are_compared(rule: Rule) -> None:
    Schedule.parse("global").check(rule)
    rng = np.random.default_rng(0)
    count = 500
    trees = [appendix_tree(int(first)) for first in rng.choice(2, p=DRAFT, size=count)]
    kept = [plan("global", [Offer(request_id=0, tree=tree)], APPENDIX)[0] for tree in trees]
    assert 0.4 < np.mean([keep.any() for keep in kept]) < 0.6
    plain = first_tokens(rule, [Proposal.empty()] * count)
    pairs = zip(trees, kept, strict=True)
    assert first_tokens(rule, [Proposal(tree.subtree(keep)) for tree, keep in pairs]) == plain
    assert abs(plain.count(0) / count - 0.7) < 4 * np.sqrt(0.7 * 0.3 / count)


def first_tokens(rule: Rule, proposals: list[Proposal]) -> list[int]:
    """The first token of each request, seeded by its place."""
    params = SamplingParams(temperature=1.0, rule=rule.value)
    jobs, start = [], 0
    for seed, proposal in enumerate(proposals):
        common = {"params": params, "rule": rule, "noise": NoiseKey(seed), "position": 0}
        jobs.append(VerifyJob(start=start, proposal=proposal, **common))
        start += jobs[-1].num_rows
    logits = torch.from_numpy(np.log(TARGET)).float().expand(start, 2)
    tokens = []
    for verdict, proposal in zip(verify(logits, jobs), proposals, strict=True):
        path = verdict.path
        tokens.append(int(proposal.tree.token[path[0]]) if path else verdict.closing)
    return tokens


# -- what is optimal -------------------------------------------------------------------------------


@given(made=rounds(), seconds=st.one_of(jagged, lines))
def test_the_global_search_equals_brute_force(made: tuple, seconds: list[float]) -> None:
    offers, value = made
    load = load_of(seconds, value)
    admitted = plan("global", offers, load)
    assert all(is_closed(o.tree, k) for o, k in zip(offers, admitted, strict=True))
    assert theta(offers, admitted, load) == pytest.approx(best_theta(offers, load), rel=1e-12)


@given(made=rounds(), seconds=st.one_of(jagged, lines))
def test_a_handful_of_nodes_is_searched_as_many_are(made: tuple, seconds: list[float]) -> None:
    """Below `FEW` nodes the search runs on lists: the same nodes, bit for bit the same worth."""
    offers, value = made
    load = load_of(seconds, value)
    few = Scheduler(Schedule.parse("auto")).plan(offers, load)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark.verify.scheduler.FEW", -1)
        many = Scheduler(Schedule.parse("auto")).plan(offers, load)
    kept, expected = ([keep.tolist() for keep in masks(offers, cuts)] for cuts in (few, many))
    assert kept == expected
    assert [cut.first for cut in few] == [cut.first for cut in many]
    assert [cut.gain for cut in few] == pytest.approx([cut.gain for cut in many], abs=1e-12)


@given(made=rounds(drawn=None), seconds=lines)
def test_with_one_peak_early_stop_equals_brute_force_whatever_the_rules(
    made: tuple, seconds: list[float]
) -> None:
    """Falling survival over a straight line of seconds has one peak."""
    offers, value = made
    # Those that share noise are decided apart, which costs some of the optimum.
    offers = [replace(offer, noise=offer.request_id) for offer in offers]
    load = load_of(seconds, value)
    best = best_theta(offers, load)
    for schedule in ("early-stop", "auto"):
        admitted = plan(schedule, offers, load)
        assert all(is_closed(o.tree, k) for o, k in zip(offers, admitted, strict=True))
        assert theta(offers, admitted, load) == pytest.approx(best, rel=1e-12)


def test_on_a_jagged_curve_early_stop_misses_what_lies_behind_a_cliff() -> None:
    offers = [Offer(request_id=0, tree=chain_of(0.9, 0.8, 0.7, 0.6))]
    load = load_of([1.0, 2.0, 2.0, 2.0, 2.0])
    (stopped,), (searched,) = plan("early-stop", offers, load), plan("global", offers, load)
    assert not stopped.any()
    assert searched.all()
    assert theta(offers, [stopped], load) == 1.0
    assert theta(offers, [searched], load) == pytest.approx(2.0)


def test_nothing_is_admitted_that_only_breaks_even() -> None:
    offers = [Offer(request_id=0, tree=chain_of(0.5, 0.25))]
    load = load_of([1.0, 1.5, 1.75])
    for schedule in ("early-stop", "global", "auto"):
        assert not plan(schedule, offers, load)[0].any()


def test_a_mixed_round_is_searched_for_those_who_may_after_the_drawn_are_settled() -> None:
    drawn = Offer(request_id=0, tree=chain_of(0.95, 0.1), is_drawn=True)
    free = Offer(request_id=1, tree=chain_of(0.9, 0.8, 0.7))
    # The first two rows are cheap, the third is a cliff with free rows behind it.
    load = load_of([1.0, 1.01, 1.02, 1.3, 1.3, 1.3], 2.0)
    both = [drawn, free]
    assert [k.tolist() for k in plan("early-stop", both, load)] == [
        [True, False],
        [True, False, False],
    ]
    admitted = plan("auto", both, load)
    assert [k.tolist() for k in admitted] == [[True, False], [True, True, True]]
    settled = [theta(both, [admitted[0], keep], load) for keep in closed_sets(free.tree)]
    assert theta(both, admitted, load) == max(settled)


def test_rows_go_to_the_request_of_higher_priority() -> None:
    load = load_of([1.0, 1.3, 1.8, 2.5], 2.0)
    same = [Offer(request_id=i, tree=chain_of(0.6)) for i in range(2)]
    assert [k.tolist() for k in plan("auto", same, load)] == [[False], [False]]
    urgent = [same[0], replace(same[1], weight=4.0)]
    admitted = plan("auto", urgent, replace(load, value=5.0))
    assert [k.tolist() for k in admitted] == [[False], [True]]


def test_a_promised_tree_stays_whole_and_its_rows_count() -> None:
    load = load_of([1.0, 1.1, 1.2, 3.0, 3.1], 2.0)
    other = Offer(request_id=1, tree=chain_of(0.9))
    promised = Offer(request_id=0, tree=chain_of(0.9, 0.01), is_promised=True)
    schedules = ("auto", "early-stop", "global", "async", "threshold:0.95", "fixed:0", "off")
    for schedule in schedules:
        assert plan(schedule, [promised, other], load)[0].all(), schedule
    assert plan("auto", [other], load)[0].all()
    assert not plan("auto", [promised, other], load)[1].any()


def test_while_costs_are_unknown_everything_is_verified() -> None:
    offers = [Offer(request_id=i, tree=chain_of(0.1), is_drawn=i == 1) for i in range(2)]
    for schedule in ("auto", "early-stop", "async"):
        assert all(keep.all() for keep in plan(schedule, offers, Load(2.0, None)))


# -- the schedules to compare with -----------------------------------------------------------------


def test_a_threshold_takes_what_reaches_it_and_a_fixed_budget_the_best() -> None:
    tree = tree_of([-1, -1, 0, 1, 2], [0.6, 0.4, 0.9, 0.9, 0.5])  # .6 .4 .54 .36 .27
    offers = [
        Offer(request_id=0, tree=tree),
        Offer(request_id=1, tree=chain_of(0.4, 0.3), is_drawn=True),
    ]
    load = load_of([1.0, 9.0], 2.0)  # what rows cost does not matter here
    taken = [k.tolist() for k in plan("threshold:0.4", offers, load)]
    assert taken == [[True, True, True, False, False], [True, False]]
    taken = [k.tolist() for k in plan("fixed:3", offers, load)]
    assert taken == [[True, True, True, False, False], [True, True]]
    assert not any(k.any() for k in plan("fixed:0", offers, load))
    assert all(k.all() for k in plan("off", offers, load))


@pytest.mark.parametrize(
    "text",
    [
        *("", "fast", "GLOBAL", "off:", "auto:3"),
        *("fixed", "fixed:-1", "fixed:2.5", "fixed:inf"),
        *("threshold", "threshold:", "threshold:0", "threshold:1.5", "threshold:nan"),
    ],
)
def test_a_schedule_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="schedule is"):
        Schedule.parse(text)


def test_a_survival_that_is_no_number_is_refused() -> None:
    tree = replace(chain_of(0.5), survival=np.array([np.nan]))
    with pytest.raises(ConfigError, match="nan"):
        plan("auto", [Offer(request_id=0, tree=tree)], APPENDIX)


# -- the asynchronous form -------------------------------------------------------------------------


def test_the_asynchronous_form_goes_by_the_round_before_the_last() -> None:
    scheduler = Scheduler(Schedule.parse("async"))
    load = load_of([1.0, 1.3, 1.6, 1.9, 2.2], 1.0)  # a node pays from .3 on, then a bit more
    sure, unsure = chain_of(0.95, 0.9, 0.85, 0.8), chain_of(0.2, 0.1, 0.05, 0.01)
    counts = []
    for tree in (sure, unsure, unsure, sure, sure, sure):
        offer = Offer(request_id=0, tree=tree)
        (keep,) = masks([offer], scheduler.plan([offer], load))
        counts.append(int(keep.sum()))
    assert counts == [4, 4, 4, 0, 0, 4]


def test_an_asynchronous_budget_is_filled_by_rank() -> None:
    scheduler = Scheduler(Schedule.parse("async"))
    load = load_of([1.0, 1.3, 1.6, 1.9, 2.2], 1.0)
    offer = Offer(request_id=0, tree=chain_of(0.9, 0.6, 0.1))
    for _ in range(2):
        scheduler.plan([offer], load)
    tree = tree_of([-1, -1, 0, 1], [0.05, 0.01, 0.9, 0.9])  # .05 .01 .045 .009
    (keep,) = masks([offer], scheduler.plan([replace(offer, tree=tree)], load))
    assert keep.tolist() == [True, False, True, False]


def test_a_released_request_leaves_no_budget_behind() -> None:
    scheduler = Scheduler(Schedule.parse("async"))
    offer = Offer(request_id=0, tree=chain_of(0.01))
    load = load_of([1.0, 2.0])
    seen = [scheduler.plan([offer], load)[0].keep for _ in range(3)]
    assert seen[0] is None
    assert not seen[2].any()
    scheduler.release(0)
    assert scheduler.plan([offer], load)[0].keep is None


# -- whom to draft for -----------------------------------------------------------------------------


@given(
    survival=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5),
    seconds=st.one_of(jagged, lines),
    weight=st.sampled_from([0.3, 1.0, 2.0]),
    drawn=st.booleans(),
)
def test_a_request_whose_best_node_is_under_the_bar_gets_no_row(
    survival: list[float], seconds: list[float], weight: float, drawn: bool
) -> None:
    tree = chain_of(*np.sort(survival)[::-1])
    offer = Offer(request_id=0, tree=tree, weight=weight, is_drawn=drawn)
    load = load_of(seconds, weight + 1.0)
    for schedule in ("auto", "early-stop"):
        scheduler = Scheduler(Schedule.parse(schedule))
        (cut,) = scheduler.plan([offer], load)
        bar = scheduler.bar(load, nodes=tree.num_nodes, weight=weight, is_drawn=drawn)
        assert cut.first == max(survival)
        if cut.first <= bar - 1e-9:
            assert not masks([offer], [cut])[0].any()
        elif tree.num_nodes == 1 and cut.first >= bar + 1e-9:
            assert masks([offer], [cut])[0].any()


@given(
    chains=st.lists(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4), min_size=1, max_size=3),
    seconds=st.lists(st.floats(0.1, 3.0), min_size=13, max_size=13),
    value=st.floats(1.0, 8.0),
)
def test_a_gain_is_what_nodes_add_over_plain_decoding_in_the_same_time(
    chains: list[list[float]], seconds: list[float], value: float
) -> None:
    trees = [chain_of(*np.sort(survival)[::-1]) for survival in chains]
    offers = [Offer(request_id=i, tree=tree) for i, tree in enumerate(trees)]
    load = load_of(seconds, value)
    cuts = Scheduler(Schedule.parse("global")).plan(offers, load)
    kept = masks(offers, cuts)
    nodes = sum(int(mask.sum()) for mask in kept)
    tokens = sum(float(t.survival[m].sum()) for t, m in zip(trees, kept, strict=True))
    rates = load.rates(nodes)
    plain = value * rates[0] / rates[nodes]  # tokens of plain decoding in the round's time
    assert sum(cut.gain for cut in cuts) == pytest.approx(value + tokens - plain, abs=1e-6)
    assert sum(cut.gain for cut in cuts) >= -1e-9
    assert all(cut.gain == 0 for cut, mask in zip(cuts, kept, strict=True) if not mask.any())


def test_the_price_of_drafting() -> None:
    load = replace(APPENDIX, asking=0.1)
    expected = 0.1 * APPENDIX.value * float(APPENDIX.rates(0)[0])
    for schedule, price in (("auto", expected), ("early-stop", expected), ("off", 0.0)):
        scheduler = Scheduler(Schedule.parse(schedule))
        assert scheduler.price(load) == pytest.approx(price)
        assert scheduler.price(Load(1.0, None, 0.1)) == 0.0


def test_the_bar_of_the_other_schedules() -> None:
    def bar(schedule: str, load: Load = APPENDIX) -> float:
        scheduler = Scheduler(Schedule.parse(schedule))
        return scheduler.bar(load, nodes=2, weight=1.0, is_drawn=False)

    assert bar("auto") == pytest.approx((1 / 0.45 - 1) / 2)  # two nodes at once
    assert bar("early-stop") == pytest.approx(1.0)  # the first alone
    assert 0.3 - 1e-9 < bar("threshold:0.3") < 0.3
    assert bar("fixed:2") == bar("off") == bar("auto", Load(1.0, None)) == 0.0
    asked = replace(APPENDIX, asking=0.1)  # a tenth of a second, for a round of so many a second
    more = 0.1 * float(APPENDIX.rates(0)[0])
    assert bar("early-stop", asked) == pytest.approx(1.0 + more)
    assert bar("auto", asked) == pytest.approx((1 / 0.45 - 1 + more) / 2)
