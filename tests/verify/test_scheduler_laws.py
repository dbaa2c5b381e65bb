"""What keeps the law of drawn tokens: a node's own token has no say in its admission.

The contract: a node's survival is known before its token is drawn. So its token can only touch the
survival of its descendants and of later siblings drawn from the same law, and of what hangs from
those. Whatever these become, the node's own admission must stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dspark.draft.base
from dspark.draft.base import DraftContext
from dspark.draft.combined import CombinedDrafter
from dspark.draft.grow import DrawnGrowth, Limits
from dspark.draft.lookup import LookupDrafter
from dspark.draft.model import ModelDrafter
from dspark.request import Rule, SamplingParams
from dspark.tree import POINT_MASS, DraftTree, Proposal
from dspark.verify.noise import NoiseKey
from dspark.verify.rules import walk_rejection
from dspark.verify.scheduler import Offer, Scheduler
from dspark.verify.scheduler_order import in_judging_order
from dspark.verify.scheduler_setting import Schedule, ScheduleKind
from tests.conftest import examples
from tests.eval.toys import VOCAB, toy_pair
from tests.verify.scheduling import chain_of, jagged, lines, load_of, masks, plan, rounds

STRICT = ("auto", "early-stop", "async", "threshold:0.4", "fixed:2")


def touched_by(proposal: Proposal, node: int) -> set[int]:
    """Nodes whose survival a node's token may touch."""
    tree, law_of = proposal.tree, proposal.law_of
    touched: set[int] = set()
    for other in range(node + 1, tree.num_nodes):
        parent = int(tree.parent[other])
        is_later = parent == tree.parent[node] and law_of[other] == law_of[node] != POINT_MASS
        if parent == node or parent in touched or is_later:
            touched.add(other)
    return touched


def redrawn(proposal: Proposal, touched: set[int], values: list[float]) -> Proposal:
    """The proposal as another token would have made it."""
    survival = proposal.tree.survival.copy()
    for node in sorted(touched):
        parent = int(proposal.tree.parent[node])
        above = survival[parent] if parent >= 0 else 1.0
        survival[node] = above * values[node % len(values)]
    return replace(proposal, tree=replace(proposal.tree, survival=survival))


def is_admitted(
    scheduler: Scheduler, proposals: list[Proposal], offers: list[Offer], seconds: list, asked: int
) -> bool:
    """Whether the node whose token is 100 + asked is admitted, after two rounds of history."""
    together = zip(proposals, in_judging_order(proposals), offers, strict=True)
    ordered = [moved if offer.is_drawn else own for own, moved, offer in together]
    now = [replace(o, tree=p.tree) for o, p in zip(offers, ordered, strict=True)]
    value = sum(offer.weight for offer in offers)
    kept = masks(now, scheduler.plan(now, load_of(seconds, value)))
    return any(100 + asked in offer.tree.token[keep] for offer, keep in zip(now, kept, strict=True))


def proposals_of(offers: list[Offer], laws: list[int]) -> list[Proposal]:
    """Offers as proposals; tokens number the nodes, a parent has laws of up to two drafters."""
    proposals, first = [], 100
    for offer in offers:
        size = offer.tree.num_nodes
        tokens = np.arange(first, first + size)
        first += size
        chosen = np.array([laws[node % len(laws)] for node in range(size)], dtype=np.int64)
        # A law belongs to one parent: parent p has laws 2 (p + 1) and 2 (p + 1) + 1.
        law_of = np.where(chosen < 0, POINT_MASS, 2 * (offer.tree.parent + 1) + chosen)
        tree = replace(offer.tree, token=tokens)
        proposals.append(Proposal(tree, law_of=law_of if offer.is_drawn else law_of[:0]))
    return proposals


@st.composite
def redraws(draw: st.DrawFn) -> tuple:
    """A mixed round, a drawn node of it, and what its token may change."""
    offers, _ = draw(rounds(drawn=None))
    nodes = [
        (i, node)
        for i, offer in enumerate(offers)
        for node in range(offer.tree.num_nodes)
        if offer.is_drawn
    ]
    if not nodes:
        offers = [replace(offer, is_drawn=True) for offer in offers]
        offers[0] = replace(offers[0], tree=chain_of(0.9, 0.5))
        nodes = [(0, 0)]
    laws = draw(st.lists(st.sampled_from([-1, 0, 0, 1]), min_size=1, max_size=4))
    values = draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=1, max_size=4))
    seconds = draw(st.one_of(jagged, lines))
    return offers, laws, draw(st.sampled_from(nodes)), values, seconds


def changes_with_its_own_token(schedule: str, made: tuple, *, is_trusted: bool = False) -> bool:
    """Whether the chosen node's admission depends on what its token may touch."""
    offers, laws, (owner, node), values, seconds = made
    proposals = proposals_of(offers, laws)
    asked = int(proposals[owner].tree.token[node]) - 100
    other = list(proposals)
    other[owner] = redrawn(proposals[owner], touched_by(proposals[owner], node), values)
    if is_trusted:  # as if the rule allowed a global search
        offers = [replace(offer, is_drawn=False) for offer in offers]
    seen = []
    for variant in (proposals, other):
        scheduler = Scheduler(Schedule.parse(schedule))
        if scheduler.schedule.kind is ScheduleKind.ASYNC:  # equal pasts
            for _ in range(2):
                is_admitted(scheduler, proposals, offers, seconds, asked)
        seen.append(is_admitted(scheduler, variant, offers, seconds, asked))
    return seen[0] != seen[1]


APPENDIX_A = (
    [Offer(request_id=0, tree=chain_of(0.8, 0.8), is_drawn=True)],
    [0],
    (0, 0),
    [0.0],
    [1, 1 / 0.5, 1 / 0.45],
)


@pytest.mark.parametrize("schedule", STRICT)
@settings(max_examples=20)
@given(made=redraws())
@example(made=APPENDIX_A)  # random rounds show a global search once in a thousand
def test_a_nodes_own_token_has_no_say_in_its_admission(schedule: str, made: tuple) -> None:
    assert not changes_with_its_own_token(schedule, made)


def test_the_same_check_catches_a_global_search() -> None:
    """Appendix A once more: the second token's survival decides about the first."""
    assert changes_with_its_own_token("global", APPENDIX_A, is_trusted=True)
    assert not changes_with_its_own_token("early-stop", APPENDIX_A)


@pytest.mark.parametrize("is_ordered", [False, True])
def test_the_judging_order_is_what_keeps_the_law_of_two_drafters(is_ordered: bool) -> None:
    """Exactly, as in appendix A: lookup's candidate is the weaker one and stands first.

    The drawn one is admitted before it, and the survival of that one's child, which its token
    made, decides whether there is a row for lookup's.
    """
    target, draft = np.array([0.7, 0.3]), np.array([0.5, 0.5])
    load = load_of([1.0, 1.1, 1.15, 1.9])
    law, variants = np.zeros(2), set()
    for drawn, chance in enumerate(draft):
        survival = [0.3, 0.6, 0.6 if drawn == 0 else 0.1]
        tree = DraftTree.build([0, drawn, 0], [-1, -1, 1], survival)
        laws = torch.from_numpy(np.stack([draft, draft]))
        proposal = Proposal(tree, laws, np.array([POINT_MASS, 0, 1]))
        if is_ordered:
            (proposal,) = in_judging_order([proposal])
        offer = Offer(request_id=0, tree=proposal.tree, is_drawn=True)
        (keep,) = masks([offer], Scheduler(Schedule.parse("early-stop")).plan([offer], load))
        variants.add(int(keep.sum()))
        proposal = proposal.subtree(keep)
        for tenths in itertools.product(np.arange(0.05, 1, 0.1), repeat=2):
            walk = walk_rejection(proposal, lambda row: target, lambda node, u=tenths: u[node % 2])
            first = walk.law / walk.law.sum()
            if walk.path:
                first = np.eye(2)[proposal.tree.token[walk.path[0]]]
            law += chance / 100 * first
    assert len(variants) == 1
    np.testing.assert_allclose(law, [0.7, 0.3] if is_ordered else [0.85, 0.15], atol=1e-12)


def test_judging_order_keeps_draw_order_and_moves_everything_along() -> None:
    tree = DraftTree.build([1, 2, 3, 4], [-1, -1, -1, 2], [0.2, 0.1, 0.5, 0.4])
    laws = torch.ones(2, VOCAB) / VOCAB
    proposal = Proposal(tree, laws, np.array([0, POINT_MASS, 0, 1]), ("a", "b", "a", "a"))
    (moved,) = in_judging_order([proposal])
    moved.validate()
    # Token 3 was drawn after token 1 from the same law, so it may not overtake it.
    assert moved.tree.token.tolist() == [1, 3, 4, 2]
    assert moved.tree.survival.tolist() == [0.2, 0.2, 0.2, 0.1]
    assert moved.law_of.tolist() == [0, 0, 1, POINT_MASS]
    assert moved.source == ("a", "a", "a", "b")
    again, chain, none = in_judging_order([moved, Proposal(chain_of(0.5, 0.2)), Proposal.empty()])
    assert again is moved
    assert chain.tree.survival.tolist() == [0.5, 0.2]
    assert none.tree.num_nodes == 0


# -- requests that share their noise ---------------------------------------------------------------


@st.composite
def twins(draw: st.DrawFn) -> tuple:
    """Two drawn requests with one seed, a third with another, and other draws of the first."""
    offers, _ = draw(rounds(drawn=True))
    first = Offer(request_id=7, tree=draw(rounds(drawn=True))[0][0].tree, is_drawn=True, noise="s")
    second = Offer(request_id=8, tree=chain_of(0.9, 0.8, 0.3), is_drawn=True, noise="s")
    other = draw(rounds(drawn=True))[0][0].tree
    return [first, second, *offers], other, draw(st.one_of(jagged, lines))


@pytest.mark.parametrize("is_promised", [False, True])
@pytest.mark.parametrize("schedule", STRICT)
@examples(8, 60)
@given(made=twins())
def test_a_request_with_the_same_noise_has_no_say(
    schedule: str, is_promised: bool, made: tuple
) -> None:
    offers, other, seconds = made
    offers[0] = replace(offers[0], is_promised=is_promised)
    seen = []
    for tree in (offers[0].tree, other):
        now = [replace(offers[0], tree=tree), *offers[1:]]
        scheduler = Scheduler(Schedule.parse(schedule))
        load = load_of(seconds, sum(offer.weight for offer in now))
        for _ in range(3):  # of the asynchronous form the third round tells
            kept = masks(now, scheduler.plan(now, load))
        seen.append(kept[1].tolist())
    assert seen[0] == seen[1]


@pytest.mark.parametrize("second", [0.0, 0.8])
def test_requests_with_the_same_noise_stop_early_too(second: float) -> None:
    """Appendix A with two rows a step; a search would admit both nodes if the second is certain."""
    offers = [
        Offer(request_id=0, tree=chain_of(0.8, second), is_drawn=True, noise="s"),
        Offer(request_id=1, tree=chain_of(0.8, 0.1), is_drawn=True, noise="s"),
    ]
    rates = (1.0, 1.0, 0.5, 0.5, 0.45)
    (kept, _) = plan("auto", offers, load_of([1 / rate for rate in rates], 2.0))
    assert not kept.any()


def test_requests_with_noise_of_their_own_share_one_budget() -> None:
    """With the same noise each reckons that the other does as it does."""
    trees = [chain_of(0.9, 0.8), chain_of(0.35, 0.3)]
    load = load_of([1.0, 1.1, 1.3, 1.8, 2.4], 2.0)

    def kept(noises: str) -> list[list[bool]]:
        offers = [
            Offer(request_id=i, tree=tree, is_drawn=True, noise=noises[i])
            for i, tree in enumerate(trees)
        ]
        return [k.tolist() for k in masks(offers, Scheduler().plan(offers, load))]

    assert kept("ab") == [[True, True], [False, False]]
    assert kept("aa") == [[True, False], [True, False]]


# -- what drafters say -----------------------------------------------------------------------------


@dataclass
class Told:
    """What was known before a node's token was drawn, and the survivals stated for it."""

    seen: dict[tuple, set[float]]
    tokens: dict[tuple, set[int]]

    @staticmethod
    def of(proposals: list[Proposal]) -> Told:
        told = Told({}, {})
        for proposal in proposals:
            tree, place = proposal.tree, {-1: ()}
            for node in range(tree.num_nodes):
                parent, token = int(tree.parent[node]), int(tree.token[node])
                # Earlier siblings' tokens may be known too; that no drafter uses them is stricter.
                known = (*place[parent], int((tree.parent[:node] == parent).sum()))
                place[node] = (*known, token)
                told.seen.setdefault(known, set()).add(float(tree.survival[node]))
                told.tokens.setdefault(known, set()).add(token)
        return told

    @property
    def is_anticipating(self) -> bool:
        """True if a survival differs where all that was known beforehand is the same."""
        return any(len(values) > 1 for values in self.seen.values())


def context_of(seed: int, tokens: list[int], rule: Rule = Rule.REJECTION) -> DraftContext:
    params = SamplingParams(temperature=1.0, rule=rule.value, seed=seed)
    return DraftContext(
        request_id=seed,
        tokens=tokens,
        prompt_length=len(tokens),
        params=params,
        rule=rule,
        noise=NoiseKey(seed),
        round=1,
        budget=7,
        depth=3,
    )


TEXT = [3, 5, 7, 9, 3, 5, 7, 11, 3, 5]


def model() -> ModelDrafter:
    return ModelDrafter(toy_pair()[1], vocab_size=VOCAB)


@pytest.mark.parametrize("rule", [Rule.REJECTION, Rule.BLOCK])
@pytest.mark.parametrize(
    "make",
    [model, LookupDrafter, lambda: CombinedDrafter(LookupDrafter(), model())],
    ids=["model", "lookup", "combined"],
)
def test_survival_of_drawn_nodes_is_known_before_the_draw(
    make: Callable[[], dspark.draft.base.Drafter], rule: Rule
) -> None:
    drafter = make()
    told = Told.of(drafter.propose([context_of(seed, TEXT, rule) for seed in range(60)]))
    assert told.seen
    assert not told.is_anticipating
    if drafter.name == "model":
        assert max(len(tokens) for tokens in told.tokens.values()) > 3


class TellTale(DrawnGrowth):
    """States the drawn token's own probability, as ranked growth may."""

    def take(self, nodes: list[int], shaped: torch.Tensor) -> None:
        before = len(self.tree)
        super().take(nodes, shaped)
        rows = {node: row for row, node in enumerate(nodes)}
        law = torch.softmax(shaped, dim=1)
        for node in range(before, len(self.tree)):
            parent = self.tree.parent[node]
            above = self.tree.survival[parent] if parent >= 0 else 1.0
            own = float(law[rows[parent], self.tree.token[node]])
            self.tree.survival[node] = above * own


@pytest.mark.parametrize("kind", [DrawnGrowth, TellTale])
def test_a_survival_that_knows_its_own_token_is_caught(kind: type[DrawnGrowth]) -> None:
    table = toy_pair()[1].table
    limits = Limits(budget=7, depth=3, width=2, beams=2, min_survival=0.0)
    proposals = []
    for seed in range(60):
        growth = kind(context_of(seed, TEXT), limits)
        while nodes := growth.frontier():
            tokens = [TEXT[-1] if n < 0 else growth.tree.token[n] for n in nodes]
            growth.take(nodes, table[tokens])
        proposals.append(growth.proposal())
    assert Told.of(proposals).is_anticipating == (kind is TellTale)
