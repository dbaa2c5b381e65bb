"""The model drafter against a naive reimplementation that scores every path by itself."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspark.draft.base import Drafter
from dspark.draft.grow import GrowthConfig, drawn_shape
from dspark.draft.model import ModelDrafter
from dspark.draft.none import NoDrafter
from dspark.errors import ConfigError
from dspark.request import Rule
from dspark.verify.noise import draft_gumbel, gumbel
from dspark.verify.sampling import shape_logits

LENIENT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
RANKED = [Rule.GREEDY, Rule.COUPLED, Rule.SAMPLE_MATCH]


def shaped_row(target, context, path):
    logits = torch.from_numpy(target.logits([*context.tokens, *path]))[None]
    return shape_logits(logits, [context.params])[0].double().numpy()


def softmax(values):
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def ranked_candidates(target, context, path, width):
    """(token, share of the parent's survival), best first."""
    values = shaped_row(target, context, path)
    if context.rule is Rule.COUPLED:
        at = context.output_position + len(path)
        values = values + gumbel(context.noise, at, np.arange(len(values)))
        order = np.argsort(-values)[: width + 4]
        shares = softmax(values[order])
        return [(int(t), float(s)) for t, s in zip(order, shares, strict=True) if s > 0][:width]
    shares = softmax(values)
    order = np.argsort(-values)[:width]
    return [(int(t), float(shares[t])) for t in order if shares[t] > 0]


def naive_ranked(target, context, config):
    """{path: survival}, by EAGLE-2's two phases over paths."""
    width = context.width or config.width
    pool: dict[tuple[int, ...], float] = {}
    frontier: list[tuple[int, ...]] = [()]
    for _ in range(context.depth):
        new = []
        for path in frontier:
            above = pool.get(path, 1.0)
            for token, share in ranked_candidates(target, context, path, width):
                pool[*path, token] = above * share
                new.append((*path, token))
        best = sorted(pool, key=lambda p: -pool[p])[: context.budget]
        good = [p for p in best if p in new and pool[p] >= config.min_survival]
        frontier = good[: config.beams]
    best = sorted(pool, key=lambda p: -pool[p])[: context.budget]
    return {path: pool[path] for path in best}


def paths_of(tree):
    return [tuple(tree.path_tokens(node)) for node in range(tree.num_nodes)]


@LENIENT
@given(
    st.integers(0, 1000),
    st.sampled_from(RANKED),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_ranked_trees_equal_the_naive_ones(
    toy_target, make_context, seed, rule, budget, depth, width, beams
):
    target = toy_target(seed=seed)
    config = GrowthConfig(beams=beams)
    drafter = ModelDrafter(target, vocab_size=7, config=config)
    params = {"top_k": 5} if seed % 2 else {}
    contexts = [
        make_context(
            [1, 2, *range(i)],
            request_id=i,
            rule=rule,
            budget=budget,
            depth=depth,
            width=width,
            params=params,
        )
        for i in range(3)
    ]
    for context, proposal in zip(contexts, drafter.propose(contexts), strict=True):
        proposal.validate()
        tree = proposal.tree
        expected = naive_ranked(target, context, config)
        assert set(paths_of(tree)) == set(expected)
        for path, worth in zip(paths_of(tree), tree.survival, strict=True):
            assert worth == pytest.approx(expected[path], rel=1e-4)
        assert not len(proposal.law_of)
    assert len(target.rows) <= depth


@LENIENT
@given(
    st.integers(0, 1000),
    st.sampled_from([Rule.REJECTION, Rule.BLOCK]),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([0, 2]),
)
def test_drawn_trees_equal_the_naive_ones(
    toy_target, make_context, seed, rule, budget, depth, width, top_k
):
    target = toy_target(seed=seed)
    drafter = ModelDrafter(target, vocab_size=7)
    context = make_context(
        [3, 1, 4],
        rule=rule,
        budget=budget,
        depth=depth,
        width=width,
        round=seed,
        params={"top_k": top_k},
    )
    proposal = drafter.propose([context])[0]
    proposal.validate()
    tree = proposal.tree
    shape = drawn_shape(budget, depth, 1 if rule is Rule.BLOCK else width)
    if top_k == 0:
        assert sorted(tree.depth.tolist()) == sorted(shape.depth.tolist())
        np.testing.assert_allclose(sorted(tree.survival), sorted(shape.survival))
    if rule is Rule.BLOCK:
        assert tree.is_chain
    for node in range(-1, tree.num_nodes):
        children = tree.children_of(node)
        if not len(children):
            continue
        path = () if node < 0 else tree.path_tokens(node)
        shaped = shaped_row(target, context, path)
        law = softmax(shaped)
        noisy = shaped + draft_gumbel(context.noise, seed, node, np.arange(7))
        drawn = np.argsort(-noisy, kind="stable")[: len(children)]
        assert tree.token[children].tolist() == drawn.tolist()
        assert len(set(proposal.law_of[children].tolist())) == 1
        kept = proposal.laws[int(proposal.law_of[children[0]])].double().numpy()
        np.testing.assert_allclose(kept, law, atol=1e-7)
        assert (law[tree.token[children]] > 0).all()


@given(st.integers(0, 20), st.integers(0, 6), st.integers(1, 5))
def test_the_drawn_shape_stays_within_its_limits(budget, depth, width):
    shape = drawn_shape(budget, depth, width)
    shape.validate()
    assert shape.num_nodes == (min(budget, shape.num_nodes) if depth else 0)
    assert shape.max_depth <= depth
    for node in range(-1, shape.num_nodes):
        draws = shape.token[shape.children_of(node)].tolist()
        assert draws == list(range(len(draws)))  # a later draw never without the earlier
        assert len(draws) <= width


def test_the_tree_of_a_request_does_not_depend_on_drawn_tokens(toy_target, make_context):
    """Non-anticipating: whatever is drawn, the shape is the same."""
    shapes = set()
    for seed in range(20):
        drafter = ModelDrafter(toy_target(seed=seed), vocab_size=7)
        context = make_context([1, 2], rule=Rule.REJECTION, budget=10, depth=4)
        tree = drafter.propose([context])[0].tree
        shapes.add((tuple(tree.parent.tolist()), tuple(tree.survival.tolist())))
    assert len(shapes) == 1


@pytest.mark.parametrize("rule", list(Rule))
def test_the_cache_holds_a_prefix_and_state_in_step_equals_scratch(toy_target, make_context, rule):
    target = toy_target()
    drafter = ModelDrafter(target, vocab_size=7)
    rng = np.random.default_rng(5)
    texts = {i: rng.integers(0, 7, 3 + 90 * i).tolist() for i in range(3)}
    for number in range(6):
        taking_part = [i for i in texts if (i + number) % 3]
        contexts = [
            make_context(texts[i], request_id=i, rule=rule, round=number) for i in taking_part
        ]
        proposals = drafter.propose(contexts)
        for i, context, proposal in zip(taking_part, contexts, proposals, strict=True):
            committed = target.cache.committed[drafter._slots[i]]
            assert committed == texts[i][:-1]
            fresh = ModelDrafter(toy_target(), vocab_size=7).propose([context])[0]
            assert paths_of(proposal.tree) == paths_of(fresh.tree)
            np.testing.assert_allclose(proposal.tree.survival, fresh.tree.survival)
            texts[i] = texts[i] + rng.integers(0, 7, 1 + number).tolist()
    drafter.release(1)
    drafter.release(99)
    assert sorted(drafter._slots) == [0, 2]
    assert len(target.cache.committed) == 2


def test_long_contexts_are_caught_up_in_chunks(toy_target, make_context):
    target = toy_target()
    drafter = ModelDrafter(target, vocab_size=7)
    contexts = [make_context([1] * size, request_id=size, depth=1) for size in (1300, 700, 80, 40)]
    drafter.propose(contexts)
    *chunks, level = target.rows
    assert max(chunks) <= 512
    assert sum(chunks) >= 1299 + 699 - 2 * 64
    assert level <= 4 * 65
    for context in contexts:
        held = target.cache.committed[drafter._slots[context.request_id]]
        assert len(held) == len(context.tokens) - 1


def test_a_rewritten_context_gets_a_new_slot(toy_target, make_context):
    target = toy_target()
    drafter = ModelDrafter(target, vocab_size=7)
    drafter.propose([make_context([1, 2, 3, 4])])
    drafter.propose([make_context([1, 2, 5])])
    assert list(target.cache.committed.values()) == [[1, 2]]


def test_processors_that_look_at_history_see_the_path(toy_target, make_context):
    config = GrowthConfig(min_survival=0.0)
    drafter = ModelDrafter(toy_target(scale=0.01), vocab_size=7, config=config)
    context = make_context([1, 2], params={"presence_penalty": 2.0}, width=1, depth=5)
    tokens = drafter.propose([context])[0].tree.token.tolist()
    assert len(tokens) == 5
    assert len(set(tokens)) == 5  # near-flat logits: each offered token is then penalised


def test_another_vocabulary_is_refused(toy_target):
    with pytest.raises(ConfigError, match=r"7 .*9"):
        ModelDrafter(toy_target(vocab=7), vocab_size=9)


@pytest.mark.parametrize("rule", list(Rule))
def test_broken_logits_cost_the_draft_and_are_reported_once(toy_target, make_context, caplog, rule):
    target = toy_target()
    target.broken = {(2, 6)}
    drafter = ModelDrafter(target, vocab_size=7)
    broken = make_context([1, 2, 6], rule=rule, request_id=1)
    sound = make_context([1, 2, 5], rule=rule, request_id=2)
    with caplog.at_level(logging.WARNING):
        first, second = drafter.propose([broken, sound])
        drafter.propose([broken])
    assert first.tree.num_nodes == 0
    assert second.tree.num_nodes > 0
    assert len(caplog.records) == 1


def test_broken_logits_below_the_anchor_keep_what_was_drawn(toy_target, make_context):
    """Dropping a drawn node because of the logits after it would be anticipating."""
    target = toy_target()
    context = make_context([1, 2], rule=Rule.REJECTION)
    whole = ModelDrafter(target, vocab_size=7).propose([context])[0].tree
    first = int(whole.token[0])
    target.broken = {(2, first)}
    cut = ModelDrafter(target, vocab_size=7).propose([context])[0]
    cut.validate()
    assert cut.tree.token[0] == first
    assert not len(cut.tree.children_of(0))
    assert len(whole.children_of(0))


def test_the_longest_context_is_respected(toy_target, make_context):
    target = toy_target(max_positions=6)  # the toy checks every position it is given
    for size, depth in ((4, 3), (5, 2), (6, 1), (7, 0), (8, 0)):
        drafter = ModelDrafter(target, vocab_size=7)
        tree = drafter.propose([make_context([1] * size, depth=9, width=1)])[0].tree
        assert tree.max_depth == depth


def test_a_full_cache_costs_the_draft_only(toy_target, make_context, caplog):
    target = toy_target(limit=100)
    drafter = ModelDrafter(target, vocab_size=7)
    with caplog.at_level(logging.WARNING):
        long, short = drafter.propose(
            [make_context([1] * 300, request_id=1), make_context([1] * 30, request_id=2)]
        )
    assert long.tree.num_nodes == 0
    assert short.tree.num_nodes > 0
    assert len(caplog.records) == 1


def test_survival_of_coupled_candidates_is_a_share(toy_target, make_context):
    drafter = ModelDrafter(toy_target(), vocab_size=7)
    tree = drafter.propose([make_context([1, 2], rule=Rule.COUPLED, budget=20)])[0].tree
    for node in range(-1, tree.num_nodes):
        above = 1.0 if node < 0 else tree.survival[node]
        shares = tree.survival[tree.children_of(node)]
        assert shares.sum() <= above * (1 + 1e-9)
        assert math.isfinite(shares.sum())


@pytest.mark.parametrize(
    "options", [{"width": 0}, {"beams": 0}, {"min_survival": 1.0}, {"min_survival": -1.0}]
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ConfigError):
        GrowthConfig(**options)


def test_drafters_meet_the_protocol(toy_target, make_context):
    assert isinstance(ModelDrafter(toy_target(), vocab_size=7), Drafter)
    none = NoDrafter()
    assert isinstance(none, Drafter)
    assert [p.tree.num_nodes for p in none.propose([make_context([1, 2])] * 2)] == [0, 0]
    none.release(0)
