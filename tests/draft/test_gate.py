"""When a second drafter is asked: what it added before against what it takes."""

from __future__ import annotations

import numpy as np
import pytest

import dspark
from dspark.draft.base import SavesTime
from dspark.draft.combined import CombinedDrafter
from dspark.draft.gate import SecondGate
from dspark.request import Rule
from dspark.tree import DraftTree, Proposal
from dspark.tree_build import chain
from tests.conftest import random_target


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Rounds:
    """Rounds of one request, 10 ms each, in which the second drafter takes `seconds`."""

    def __init__(self, seconds, node_seconds=0.0):
        self.node_seconds = node_seconds
        self.clock = Clock()
        self.gate = SecondGate(self.clock)
        self.seconds, self.text, self.asked = seconds, [1, 2, 3], []

    def run(self, count, *, first, united, after):
        """Whether it was asked in each of `count` rounds that all go the same way."""
        for _ in range(count):
            self.gate.follow([0], [self.text])
            asks = self.gate.asks(first)
            self.clock.now += 0.01
            if asks:
                self.clock.now += self.seconds
                self.gate.took(self.seconds, [0])
                self.gate.note(0, len(self.text), first, united, node_seconds=self.node_seconds)
            self.asked.append(asks)
            self.text = [*self.text, *after]
        return self.asked[-count:]


MISSES = chain([7, 8], [0.3, 0.2])
FINDS = DraftTree(
    np.array([7, 8, 5, 6]), np.array([-1, 0, -1, 2]), np.array([1, 2, 1, 2]), np.full(4, 0.3)
)


def test_it_is_asked_while_it_adds_more_than_it_takes():
    # 3 tokens in 12 ms: 2 ms are worth half a token, and it adds two.
    assert all(Rounds(0.002).run(60, first=MISSES, united=FINDS, after=[5, 6, 9]))


def test_it_is_left_out_where_it_adds_nothing_but_tried_again_now_and_then():
    asked = Rounds(0.002).run(200, first=MISSES, united=FINDS, after=[7, 8, 9])
    assert all(asked[:8])
    assert 10 <= sum(asked[8:]) <= 13


def test_it_is_left_out_where_it_takes_longer_than_what_it_adds_is_worth():
    asked = Rounds(0.05).run(200, first=MISSES, united=FINDS, after=[5, 9])
    assert sum(asked[40:]) <= 11


def test_what_is_unlikely_is_not_counted_on():
    doubtful = DraftTree(FINDS.token, FINDS.parent, FINDS.depth, np.array([0.3, 0.2, 0.05, 0.05]))
    asked = Rounds(0.002).run(100, first=MISSES, united=doubtful, after=[5, 6, 9])
    assert sum(asked[8:]) <= 6


@pytest.mark.parametrize(("node_seconds", "asks"), [(0.0, True), (0.0005, True), (0.002, False)])
def test_what_it_adds_has_to_pay_for_its_nodes(node_seconds, asks):
    """Two tokens in 12 ms: 2 ms are worth a third of one, and it adds one with five nodes."""
    tokens = [7, 8, 5, 6, 10, 11, 12]
    more = DraftTree(
        np.array(tokens), np.array([-1, 0, *[-1] * 5]), np.array([1, 2, *[1] * 5]), np.full(7, 0.5)
    )
    rounds = Rounds(0.002, node_seconds)
    rounds.run(40, first=MISSES, united=more, after=[5, 9])
    asked = rounds.run(100, first=MISSES, united=more, after=[5, 9])
    assert all(asked) if asks else sum(asked) <= 8


def test_nodes_that_would_not_be_verified_cost_nothing():
    """At 250 tokens a second, 0.5 ms a node are worth an eighth of a token."""
    many = [*range(20, 60)]
    more = DraftTree(
        np.array([7, 5, *many]),
        np.full(42, -1),
        np.ones(42, dtype=np.int64),
        np.array([0.3, 0.3, *[0.01] * 40]),
    )
    rounds = Rounds(0.002, 0.0005)
    rounds.run(40, first=MISSES, united=more, after=[5, 9])
    assert all(rounds.run(60, first=MISSES, united=more, after=[5, 9]))


def test_it_learns_apart_where_the_first_is_sure_and_where_not():
    rounds = Rounds(0.002)
    sure = chain([7, 8], [0.99, 0.9])
    for _ in range(100):
        rounds.run(1, first=MISSES, united=FINDS, after=[5, 6, 9])
        rounds.run(1, first=sure, united=sure, after=[7, 8, 9])
    assert all(rounds.asked[::2])
    assert sum(rounds.asked[1::2]) <= 15


def test_it_comes_back_when_it_begins_to_add():
    rounds = Rounds(0.002)
    rounds.run(100, first=MISSES, united=FINDS, after=[7, 8, 9])
    asked = rounds.run(1200, first=MISSES, united=FINDS, after=[5, 6, 9])
    assert all(asked[-200:])


@pytest.mark.parametrize("before", [0, 50], ids=["first, which reads the prompt", "one of many"])
def test_one_slow_call_does_not_shut_it_out(before):
    rounds = Rounds(0.002)
    rounds.run(before, first=MISSES, united=FINDS, after=[5, 6, 9])
    rounds.seconds = 4.0
    rounds.run(1, first=MISSES, united=FINDS, after=[5, 6, 9])
    rounds.seconds = 0.002
    assert all(rounds.run(100, first=MISSES, united=FINDS, after=[5, 6, 9]))


def test_tokens_of_rounds_that_it_did_not_see_are_no_speed():
    """A request that comes back brings what it made meanwhile."""
    rounds = Rounds(0.002)
    rounds.run(20, first=MISSES, united=FINDS, after=[5, 6, 9])
    before = rounds.gate.rate
    others = [1, 2, 3]
    for _ in range(20):  # another request's rounds
        rounds.gate.follow([1], [others])
        rounds.clock.now += 0.012
        others = [*others, 5, 6, 9]
    rounds.text = [*rounds.text, *[5] * 60]
    rounds.gate.follow([0, 1], [rounds.text, others])
    assert rounds.gate.rate == pytest.approx(before, rel=0.1)


def test_a_request_that_ended_is_forgotten():
    rounds = Rounds(0.002)
    rounds.run(3, first=MISSES, united=FINDS, after=[5, 6, 9])
    rounds.gate.release(0)
    rounds.gate.release(7)
    rounds.text = [4]
    assert rounds.run(1, first=MISSES, united=FINDS, after=[5]) == [True]


class Fixed:
    """Offers the same tree always."""

    capture = ()

    def __init__(self, name, tokens):
        self.name, self.tree, self.calls = name, chain(tokens, [0.5] * len(tokens)), 0

    def propose(self, contexts):
        self.calls += len(contexts)
        return [Proposal(self.tree) for _ in contexts]

    def release(self, request_id):
        pass


def test_only_rules_that_look_at_tokens_leave_it_out(make_context):
    drafter = CombinedDrafter(Fixed("one", [7, 8]), Fixed("two", [90]))
    assert isinstance(drafter, SavesTime)
    drafter.saves_time = True
    for rule, is_gated in ((Rule.GREEDY, True), (Rule.COUPLED, True), (Rule.BLOCK, False)):
        second = drafter._second = Fixed("two", [90])
        for size in range(100):
            text = [3] * (3 + size)
            drafter.propose([make_context(text, rule=rule, request_id=int(rule is Rule.BLOCK))])
        assert second.calls <= 30 if is_gated else second.calls == 100


@pytest.mark.parametrize("auto_off", [True, False])
def test_the_engine_says_whether_to_save_time_and_texts_stay(auto_off):
    target = random_target("llama", exact=True, layers=2)
    inner = CombinedDrafter(Fixed("one", [7, 8]), Fixed("two", [9]))
    drafter = CombinedDrafter(inner, Fixed("three", [5, 6]))
    params = dspark.SamplingParams(max_tokens=30, ignore_eos=True)
    config = dspark.EngineConfig(auto_off=auto_off)
    prompts = [[5, 9, 31, 7], [70, 71]]
    found = dspark.Engine(target, drafter=drafter, config=config).generate(prompts, params)
    plain = dspark.Engine(target, config=config).generate(prompts, params)
    assert [r.token_ids for r in found] == [r.token_ids for r in plain]
    assert drafter.saves_time is inner.saves_time is auto_off


@pytest.mark.parametrize(
    ("seconds", "price"),
    [
        (lambda rows: 0.01 + 0.001 * rows + 1e-6 * rows**2, 0.001 + 1e-6 * (9**2 - 1) / 8),
        (lambda rows: 0.02 - 0.0005 * rows, 0.0),  # nine rows were measured to take less than one
    ],
)
def test_the_engine_says_what_a_node_takes(seconds, price):
    seen = []

    class Listener(Fixed):
        def propose(self, contexts):
            seen.extend(context.node_seconds for context in contexts)
            return super().propose(contexts)

    config = dspark.EngineConfig(auto_off=False, step_seconds=lambda rows, _: seconds(rows))
    target = random_target("llama", exact=True, layers=2)
    engine = dspark.Engine(target, drafter=Listener("one", [7, 8]), config=config)
    engine.generate([[5, 9, 31, 7]], dspark.SamplingParams(max_tokens=6, ignore_eos=True))
    assert seen[0] == pytest.approx(price)
