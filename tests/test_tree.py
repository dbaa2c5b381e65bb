"""Draft trees: structure, pruning, builders, merging."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.errors import ConfigError, ShapeError
from dspark.target import TokenBatch
from dspark.tree import POINT_MASS, DraftTree, Proposal
from dspark.tree_build import beam, best_first, chain, static, static_shape, verify_part
from dspark.tree_merge import limit_width, merge


@st.composite
def trees(draw, max_nodes=12, vocab=6):
    size = draw(st.integers(0, max_nodes))
    parents = [draw(st.integers(-1, i - 1)) for i in range(size)]
    tokens = [draw(st.integers(0, vocab - 1)) for _ in range(size)]
    survival: list[float] = []
    for parent in parents:
        above = 1.0 if parent < 0 else survival[parent]
        survival.append(above * draw(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0])))
    return DraftTree.build(tokens, parents, survival)


def ancestors(tree, node):
    found = []
    while node >= 0:
        found.append(node)
        node = int(tree.parent[node])
    return found[::-1]


def closed_subsets(tree, most):
    for size in range(most + 1):
        for nodes in combinations(range(tree.num_nodes), size):
            if all(tree.parent[n] < 0 or int(tree.parent[n]) in nodes for n in nodes):
                yield nodes


@given(trees(max_nodes=20))
def test_masks_paths_and_children_match_the_parents(tree):
    tree.validate()
    mask = tree.ancestor_mask()
    assert mask.dtype == np.bool_
    assert mask.shape == (tree.num_nodes, tree.num_nodes)
    start, child = tree.children()
    for node in range(-1, tree.num_nodes):
        path = ancestors(tree, node)
        assert tree.path_to(node) == path
        assert tree.path_tokens(node) == [int(tree.token[n]) for n in path]
        below = [n for n in range(tree.num_nodes) if tree.parent[n] == node]
        assert tree.children_of(node).tolist() == below
        assert child[start[node + 1] : start[node + 2]].tolist() == below
        if node >= 0:
            assert np.flatnonzero(mask[node]).tolist() == path
            assert tree.depth[node] == len(path)
    assert tree.max_depth == max(tree.depth, default=0)
    assert tree.is_chain == all(p == i - 1 for i, p in enumerate(tree.parent))


@given(trees(max_nodes=9), st.integers(0, 10))
def test_pruning_keeps_the_best_closed_set(tree, budget):
    kept = tree.best(budget)
    assert len(kept) == min(budget, tree.num_nodes)
    small = tree.subtree(kept)
    small.validate()
    best = max(tree.survival[list(nodes)].sum() for nodes in closed_subsets(tree, budget))
    assert small.survival.sum() == pytest.approx(best)
    for new, old in enumerate(kept):
        assert small.path_tokens(new) == tree.path_tokens(int(old))


@given(trees(max_nodes=14), st.integers(0, 15))
def test_pruning_by_parents_keeps_draw_order_and_ancestors(tree, budget):
    kept = set(tree.best_by_parents(budget).tolist())
    assert len(kept) == min(budget, tree.num_nodes)
    for node in kept:
        parent = int(tree.parent[node])
        assert parent < 0 or parent in kept
        assert {n for n in tree.children_of(parent).tolist() if n < node} <= kept


@given(trees(max_nodes=12), st.integers(1, 12), st.data())
def test_pruning_by_parents_ignores_what_a_node_s_own_token_could_change(tree, budget, data):
    """The rejection rule stays exact only if no node is kept or dropped for its own token."""
    if not tree.num_nodes:
        return
    node = data.draw(st.integers(0, tree.num_nodes - 1))
    changed = tree.survival.copy()
    factor = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    for other in range(tree.num_nodes):
        if node in ancestors(tree, other):
            changed[other] *= factor
    other_tree = DraftTree.build(tree.token, tree.parent, changed)
    before, after = tree.best_by_parents(budget), other_tree.best_by_parents(budget)
    assert (node in before) == (node in after)


def test_best_would_fail_the_same_check():
    """The planted fault: survival of a drawn node decides about the node itself."""
    likely = DraftTree.build([1, 2], [-1, -1], [0.5, 0.4])
    unlikely = DraftTree.build([1, 2], [-1, -1], [0.3, 0.4])
    assert 0 in likely.best(1)
    assert 0 not in unlikely.best(1)
    assert 0 in unlikely.best_by_parents(1)


@given(trees(), st.data())
def test_a_subtree_must_be_closed(tree, data):
    keep = np.array([data.draw(st.booleans()) for _ in range(tree.num_nodes)], dtype=bool)
    is_closed = all(p < 0 or keep[p] for p, k in zip(tree.parent, keep, strict=True) if k)
    if not is_closed:
        with pytest.raises(ShapeError):
            tree.subtree(keep)
        return
    small = tree.subtree(keep)
    small.validate()
    assert small.token.tolist() == tree.token[keep].tolist()
    np.testing.assert_array_equal(tree.subtree(np.flatnonzero(keep)).parent, small.parent)


@pytest.mark.parametrize(
    ("token", "parent", "survival", "error"),
    [
        ([1], [0], None, ShapeError),
        ([1, 2], [1, -1], None, ShapeError),
        ([1], [-2], None, ShapeError),
        ([1, 2], [-1], None, ShapeError),
        ([[1]], [[-1]], None, ShapeError),
        ([-1], [-1], None, ConfigError),
        ([1], [-1], [1.5], ConfigError),
        ([1], [-1], [float("nan")], ConfigError),
        ([1, 2], [-1, 0], [0.5, 0.6], ConfigError),
        ([1], [-1], [0.5, 0.5], ShapeError),
    ],
)
def test_bad_trees_are_refused(token, parent, survival, error):
    with pytest.raises(error):
        DraftTree.build(token, parent, survival)


def test_wrong_depths_nodes_and_masks_are_refused():
    tree = chain([1, 2], [0.5, 0.25])
    wrong = DraftTree(tree.token, tree.parent, tree.depth + 1, tree.survival)
    with pytest.raises(ShapeError):
        wrong.validate()
    for bad in (np.array([1, 0]), np.array([2]), np.array([True])):
        with pytest.raises(ShapeError):
            tree.subtree(bad)
    with pytest.raises(ShapeError):
        tree.path_to(2)
    with pytest.raises(ConfigError):
        tree.best(-1)
    with pytest.raises(ConfigError):
        tree.best_by_parents(-1)


def test_a_proposal_s_laws_follow_its_nodes():
    tree = DraftTree.build([5, 6, 7, 8], [-1, -1, 0, 1], [0.4, 0.6, 0.1, 0.5])
    laws = torch.eye(3)
    proposal = Proposal(tree, laws, np.array([0, POINT_MASS, 1, 2]), ("a", "b", "a", "b"))
    proposal.validate()
    by_survival = proposal.prune(2, anticipating=True)
    assert by_survival.tree.token.tolist() == [6, 8]
    assert by_survival.law_of.tolist() == [POINT_MASS, 2]
    assert by_survival.source == ("b", "b")
    assert by_survival.laws is laws
    assert proposal.prune(1).tree.token.tolist() == [5]  # with laws: draw order decides
    assert Proposal(tree).prune(1).tree.token.tolist() == [6]
    assert proposal.prune(9) is proposal
    by_mask = proposal.subtree(np.array([False, True, False, True]))
    assert by_mask.source == ("b", "b")
    for bad in (
        Proposal(tree, laws, np.array([0])),
        Proposal(tree, laws, np.array([0, 1, 2, 3])),
        Proposal(tree, laws[0], np.zeros(4, dtype=np.int64)),
        Proposal(tree, source=("a",)),
    ):
        with pytest.raises(ShapeError):
            bad.validate()
    Proposal.empty().validate()


@given(trees(), st.integers(0, 30))
def test_verify_rows_are_the_anchor_and_the_nodes(tree, position):
    part = verify_part(3, 99, position, tree)
    batch = TokenBatch.build([verify_part(1, 42, 5, DraftTree.empty()), part])
    assert batch.token_ids.tolist() == [42, 99, *tree.token.tolist()]
    assert batch.output_rows.tolist() == list(range(tree.num_nodes + 2))
    assert batch.spans[1].is_chain == tree.is_chain
    for node in range(tree.num_nodes):
        row = 2 + node
        assert batch.positions[row] == position + len(ancestors(tree, node))
        above = int(tree.parent[node])
        assert batch.parent[row] == (1 if above < 0 else 2 + above)


def test_chain_and_static_shapes():
    line = chain([4, 5, 6], [0.9, 0.8, 0.1])
    assert line.is_chain
    assert line.depth.tolist() == [1, 2, 3]
    parent, rank = static_shape((2, 2))
    assert parent.tolist() == [-1, -1, 0, 0, 1, 1]
    assert rank.tolist() == [0, 1, 0, 1, 0, 1]
    parent, rank = static_shape([[1], [0, 1]])  # [0] is added
    assert parent.tolist() == [-1, -1, 0]
    assert rank.tolist() == [0, 1, 1]
    tree = static([[0, 1], [1]], [[10, 11], [20, 21]], [[0.5, 0.4], [0.5, 0.25]])
    assert tree.path_tokens(2) == [10, 21]
    assert tree.survival.tolist() == [0.5, 0.4, 0.125]
    assert static((), np.zeros((0, 0))).num_nodes == 0
    for shape in ((3,), (1, 1, 1), [[0, 0, 0]]):
        with pytest.raises(ShapeError):
            static(shape, [[10, 11], [20, 21]])
    with pytest.raises(ShapeError):
        static((1,), [1, 2])
    for shape in ((0,), [[-1]], [1, [0]]):
        with pytest.raises(ConfigError):
            static_shape(shape)


class Toy:
    """A law per path, from a hash; counts what was expanded."""

    def __init__(self, seed, vocab):
        self.seed = seed
        self.vocab = vocab
        self.calls: list[int] = []

    def law(self, path):
        rng = np.random.default_rng([self.seed, *path])
        law = rng.dirichlet(np.full(self.vocab, 0.4))
        order = np.argsort(-law, kind="stable")
        return order.tolist(), law[order].tolist()

    def expand(self, grown, nodes):
        self.calls.append(len(nodes))
        return [self.law(grown.path_tokens(node)) for node in nodes]


def full_tree(toy, depth, width):
    """Every node within depth and width."""
    paths: list[tuple[tuple[int, ...], float]] = []
    level: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    for _ in range(depth):
        new = []
        for path, worth in level:
            tokens, probs = toy.law(path)
            new += [
                ((*path, t), worth * p) for t, p in list(zip(tokens, probs, strict=True))[:width]
            ]
        paths += new
        level = new
    return paths


@given(
    st.integers(0, 10_000),
    st.integers(0, 12),
    st.integers(0, 4),
    st.integers(1, 3),
    st.integers(1, 5),
)
def test_best_first_is_optimal_within_its_limits(seed, budget, depth, width, batch):
    toy = Toy(seed, 4)
    tree = best_first(toy.expand, budget=budget, depth=depth, width=width, batch=batch)
    tree.validate()
    best = sorted((worth for _, worth in full_tree(toy, depth, width)), reverse=True)[:budget]
    assert tree.survival.tolist() == pytest.approx(best)
    assert max(toy.calls, default=0) <= batch
    alone = best_first(Toy(seed, 4).expand, budget=budget, depth=depth, width=width)
    paths = {tuple(tree.path_tokens(n)) for n in range(tree.num_nodes)}
    assert paths == {tuple(alone.path_tokens(n)) for n in range(alone.num_nodes)}


@given(
    st.integers(0, 10_000),
    st.integers(0, 12),
    st.integers(0, 4),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_beam_respects_its_limits_and_a_wide_one_is_optimal(seed, budget, depth, width, beams):
    toy = Toy(seed, 4)
    tree = beam(toy.expand, budget=budget, depth=depth, width=width, beams=beams)
    tree.validate()
    assert tree.num_nodes <= budget
    assert tree.max_depth <= depth
    assert max(toy.calls, default=0) <= beams
    assert len(toy.calls) <= depth
    if tree.num_nodes:
        assert np.bincount(tree.parent + 1).max() <= width
    widest = beam(toy.expand, budget=budget, depth=depth, width=width, beams=max(budget, 1))
    best = sorted((worth for _, worth in full_tree(toy, depth, width)), reverse=True)[:budget]
    assert sorted(widest.survival, reverse=True) == pytest.approx(best)


def test_builders_refuse_bad_limits():
    toy = Toy(0, 3)
    with pytest.raises(ConfigError):
        best_first(toy.expand, budget=-1, depth=1, width=1)
    with pytest.raises(ConfigError):
        best_first(toy.expand, budget=1, depth=1, width=0)
    with pytest.raises(ConfigError):
        best_first(toy.expand, budget=1, depth=1, width=1, batch=0)
    with pytest.raises(ConfigError):
        beam(toy.expand, budget=1, depth=-1, width=1, beams=1)
    with pytest.raises(ConfigError):
        beam(toy.expand, budget=1, depth=1, width=1, beams=0)


@given(trees(vocab=3), trees(vocab=3))
def test_a_merged_tree_has_the_paths_of_both_once(first, second):
    both = merge(Proposal(first), Proposal(second), keep_duplicates=False).tree
    both.validate()
    paths = [tuple(both.path_tokens(n)) for n in range(both.num_nodes)]
    offered = {tuple(t.path_tokens(n)) for t in (first, second) for n in range(t.num_nodes)}
    assert set(paths) == offered
    new = paths[first.num_nodes :] if first.num_nodes else []
    assert len(new) == len(set(new))  # first's own duplicates stay, second adds none
    if first.num_nodes and second.num_nodes:
        assert paths[: first.num_nodes] == [
            tuple(first.path_tokens(n)) for n in range(len(first.token))
        ]
        for node in range(-1, both.num_nodes):
            above = 1.0 if node < 0 else both.survival[node]
            assert both.survival[both.children_of(node)].sum() <= above + 1e-9


def test_a_united_node_has_the_larger_survival():
    first = Proposal(DraftTree.build([1, 2], [-1, 0], [0.5, 0.1]), source=("a", "a"))
    second = Proposal(DraftTree.build([1, 2, 3], [-1, 0, 0], [0.4, 0.3, 0.1]), source=("b",) * 3)
    both = merge(first, second, keep_duplicates=False)
    assert both.tree.token.tolist() == [1, 2, 3]
    assert both.tree.survival.tolist() == [0.5, 0.3, 0.1]
    assert both.source == ("a", "a", "b")


def test_merging_for_rejection_keeps_every_candidate_and_its_law():
    first = Proposal(
        DraftTree.build([1, 2], [-1, 0], [0.5, 0.1]), law_of=np.array([POINT_MASS, POINT_MASS])
    )
    laws = torch.tensor([[0.1, 0.5, 0.4], [0.2, 0.3, 0.5]])
    second = Proposal(DraftTree.build([1, 2], [-1, 0], [0.4, 0.2]), laws, np.array([0, 1]))
    both = merge(first, second, keep_duplicates=True)
    both.validate()
    assert both.tree.token.tolist() == [1, 2, 1, 2]
    assert both.tree.parent.tolist() == [-1, 0, -1, 2]
    assert both.law_of.tolist() == [-1, -1, 0, 1]
    assert both.tree.survival.tolist() == pytest.approx([0.5, 0.1, 0.2, 0.1])
    third = merge(second, second, keep_duplicates=True)
    assert third.law_of.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(third.laws, torch.cat([laws, laws]))
    assert merge(Proposal.empty(), second, keep_duplicates=True) is second
    assert merge(second, Proposal.empty(), keep_duplicates=True) is second
    with pytest.raises(ShapeError):
        merge(Proposal(first.tree), second, keep_duplicates=True)
    narrow = Proposal(second.tree, laws[:, :2], second.law_of)
    with pytest.raises(ShapeError):
        merge(second, narrow, keep_duplicates=True)


@given(trees(), st.integers(1, 3), st.booleans())
def test_a_limited_width_holds_everywhere(tree, width, by_survival):
    small = limit_width(Proposal(tree), width, by_survival=by_survival).tree
    small.validate()
    if small.num_nodes:
        assert np.bincount(small.parent + 1).max() <= width
    roots = tree.children_of(-1)
    if by_survival and len(roots) > width:
        best = sorted(tree.survival[roots], reverse=True)[:width]
        assert sorted(small.survival[small.children_of(-1)], reverse=True) == pytest.approx(best)
    elif not by_survival:
        kept = small.token[small.children_of(-1)].tolist()
        assert kept == tree.token[roots[:width]].tolist()
