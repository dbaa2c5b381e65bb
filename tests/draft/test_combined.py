"""Two drafters under one budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspark.draft.base import Drafter
from dspark.draft.combined import CombinedConfig, CombinedDrafter
from dspark.draft.lookup import LookupDrafter
from dspark.draft.model import ModelDrafter
from dspark.draft.none import NoDrafter
from dspark.errors import ConfigError
from dspark.request import Rule
from dspark.tree import POINT_MASS, Proposal
from dspark.tree_build import chain

TEXT = [1, 2, 3, 4, 0, 1, 2, 5, 6, 1, 2]


class Fixed:
    """Offers one chain; remembers the contexts it was asked with."""

    def __init__(self, name, tokens, survival, *, capture=()):
        self.name = name
        self.capture = capture
        self.tokens, self.survival = tokens, survival
        self.asked = []
        self.released = []

    def propose(self, contexts):
        self.asked.extend(contexts)
        return [self._chain(context) for context in contexts]

    def _chain(self, context):
        n = min(len(self.tokens), context.budget, context.depth)
        laws = n if context.rule.draws_from_laws else 0
        tree = chain(self.tokens[:n], self.survival[:n])
        return Proposal(tree, law_of=np.full(laws, POINT_MASS, dtype=np.int64))

    def release(self, request_id):
        self.released.append(request_id)


def pair(first=(0.5, 0.4, 0.1), second=(0.6, 0.3, 0.2), **options):
    a = Fixed("a", [1, 2, 3], first, capture=(3, 1))
    b = Fixed("b", [1, 2, 4], second, capture=(1, 7))
    return a, b, CombinedDrafter(a, b, **options)


def test_names_captures_and_releases_reach_both():
    a, b, both = pair()
    assert isinstance(both, Drafter)
    assert both.name == "a+b"
    assert both.capture == (1, 3, 7)
    both.release(4)
    assert a.released == b.released == [4]


@pytest.mark.parametrize("rule", [Rule.GREEDY, Rule.COUPLED, Rule.SAMPLE_MATCH])
def test_trees_are_united_and_the_best_nodes_remain(make_context, rule):
    _, _, both = pair()
    proposal = both.propose([make_context(TEXT, rule=rule, budget=3)])[0]
    proposal.validate()
    assert proposal.tree.token.tolist() == [1, 2, 4]
    assert proposal.tree.survival.tolist() == [0.6, 0.4, 0.2]
    assert proposal.source == ("a", "a", "b")


def test_the_rejection_rule_splits_the_budget_before_any_draw(make_context):
    a, b, both = pair()
    proposal = both.propose([make_context(TEXT, rule=Rule.REJECTION, budget=4, round=9)])[0]
    proposal.validate()
    assert proposal.tree.token.tolist() == [1, 2, 1, 2]  # nothing is united
    assert proposal.tree.parent.tolist() == [-1, 0, -1, 2]
    assert a.asked[0].budget == 2
    assert b.asked[0].budget == 2
    assert a.asked[0].round == 9
    assert b.asked[0].round != 9  # its own noise
    for budget in range(1, 9):
        tree = both.propose([make_context(TEXT, rule=Rule.REJECTION, budget=budget)])[0].tree
        assert tree.num_nodes <= budget


def test_what_the_first_leaves_the_second_may_spend(make_context):
    _, b, _ = pair()
    both = CombinedDrafter(NoDrafter(), b)
    proposal = both.propose([make_context(TEXT, rule=Rule.REJECTION, budget=3)])[0]
    assert b.asked[0].budget == 3
    assert proposal.tree.token.tolist() == [1, 2, 4]


def test_drafters_inside_drafters_never_share_their_noise(make_context):
    leaves = [Fixed(n, [1], [0.5]) for n in "abcd"]
    a, b, c, d = leaves
    both = CombinedDrafter(CombinedDrafter(a, CombinedDrafter(b, c)), d)
    assert both.leaves == 4
    both.propose([make_context(TEXT, rule=Rule.REJECTION, budget=16, round=2)])
    assert len({leaf.asked[0].round for leaf in leaves}) == 4


@pytest.mark.parametrize(("survival", "expected"), [((0.9, 0.8, 0.7), "a"), ((0.5, 0.4, 0.1), "b")])
def test_the_block_rule_gets_one_chain(make_context, survival, expected):
    _, _, both = pair(first=survival)
    proposal = both.propose([make_context(TEXT, rule=Rule.BLOCK)])[0]
    assert proposal.tree.is_chain
    assert set(proposal.source) == {expected}
    assert len(proposal.law_of) == 3


def test_the_width_of_the_request_holds_for_both_together(make_context):
    a, b = Fixed("a", [1], [0.3]), Fixed("b", [2], [0.6])
    both = CombinedDrafter(a, b)
    for rule, token in ((Rule.GREEDY, 2), (Rule.REJECTION, 1)):
        tree = both.propose([make_context(TEXT, rule=rule, width=1)])[0].tree
        assert tree.token.tolist() == [token]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=20),
    st.sampled_from(list(Rule)),
    st.integers(1, 10),
    st.integers(1, 4),
)
def test_lookup_and_model_together_stay_within_their_limits(
    toy_target, make_context, tokens, rule, budget, depth
):
    both = CombinedDrafter(LookupDrafter(), ModelDrafter(toy_target(), vocab_size=7))
    contexts = [
        make_context(tokens[: 2 + i], request_id=i, rule=rule, budget=budget, depth=depth)
        for i in range(len(tokens) - 1)
    ]
    for proposal in both.propose(contexts):
        proposal.validate()
        assert 0 < proposal.tree.num_nodes <= budget
        assert proposal.tree.max_depth <= depth
        assert len(proposal.source) == proposal.tree.num_nodes
        assert len(proposal.law_of) == (proposal.tree.num_nodes if rule.draws_from_laws else 0)


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.0}, {"sure": 1.5}])
def test_bad_settings_are_refused(options):
    with pytest.raises(ConfigError):
        CombinedConfig(**options)
