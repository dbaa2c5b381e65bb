"""Rules walk trees as documented; edges; how often coupled and rejection agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.errors import ConfigError, DataError, ShapeError
from dspark.tree import POINT_MASS, DraftTree, Proposal
from dspark.verify.noise import NoiseKey, Stream, draft_topk, perturbed_argmax, perturbed_topk
from dspark.verify.rules import children_of, draw, walk_block, walk_rejection, walk_targets


def tree_of(tokens: list[int], parents: list[int]) -> DraftTree:
    depth: list[int] = []
    for p in parents:
        depth.append(1 if p < 0 else depth[p] + 1)
    arrays = [np.array(x, dtype=np.int64) for x in (tokens, parents, depth)]
    return DraftTree(*arrays, survival=np.ones(len(tokens)))


def proposal_of(
    tokens: list[int], parents: list[int], laws: list[list[float]], law_of: list[int]
) -> Proposal:
    rows = torch.tensor(laws, dtype=torch.float64) if laws else None
    return Proposal(tree=tree_of(tokens, parents), laws=rows, law_of=np.array(law_of, np.int64))


def test_children_keep_draw_order() -> None:
    assert children_of(tree_of([5, 6, 7, 8], [-1, 0, -1, 0])) == [[0, 2], [1, 3], [], [], []]
    with pytest.raises(ShapeError, match="node 0 has parent 0"):
        children_of(DraftTree(*[np.array([0, 1])] * 3, survival=np.ones(2)))


def test_a_walk_follows_the_targets_tokens() -> None:
    tree = tree_of([5, 6, 7, 8], [-1, -1, 1, 1])
    assert walk_targets(tree, [6, 0, 8, 1, 2]) == ((1, 3), (2, 2), 2)
    assert walk_targets(tree, [5, 9, 8, 1, 2]) == ((0,), (1,), 9)
    assert walk_targets(tree, [4, 9, 8, 1, 2]) == ((), (2,), 4)
    assert walk_targets(tree_of([], []), [4]) == ((), (), 4)
    with pytest.raises(ShapeError, match="4 nodes"):
        walk_targets(tree, [1, 2])


def test_among_equal_siblings_the_first_is_taken() -> None:
    tree = tree_of([5, 5, 6, 7], [-1, -1, 0, 1])
    assert walk_targets(tree, [5, 7, 7, 0, 0]) == ((0,), (1, 1), 7)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=6).filter(lambda x: sum(x) > 1e-3),
    st.one_of(st.just(0.0), st.just(1 - 2.0**-53), st.floats(0, 1, exclude_max=True)),
)
def test_a_token_without_probability_is_never_drawn(law: list[float], u: float) -> None:
    p = np.array(law)
    token = draw(p, u)
    assert p[token] > 0
    before = p[:token].sum()
    assert before <= u * p.sum() + 1e-12
    assert u * p.sum() <= before + p[token] + 1e-12


def test_a_uniform_of_exactly_zero_accepts_no_impossible_token() -> None:
    target = np.array([0.0, 0.6, 0.4])
    one = proposal_of([0], [-1], [[1.0, 0.0, 0.0]], [0])
    for rule in (walk_rejection, walk_block):
        for p in (one, proposal_of([0], [-1], [], [POINT_MASS])):
            walk = rule(p, lambda _: target, lambda _: 0.0)
            assert walk.path == ()
            assert walk.law / walk.law.sum() == pytest.approx(target)


@given(st.integers(0, 10**6), st.sampled_from([2, 3, 8, 50]))
def test_accepting_and_recovering_add_up_to_the_target(seed: int, size: int) -> None:
    """The identity behind rejection, without sampling, in float64."""
    rng = np.random.default_rng(seed)
    target, draft = rng.dirichlet(np.full(size, 0.3), 2)
    total = np.zeros(size)
    for token in range(size):
        one = proposal_of([token], [-1], [draft.tolist()], [0])
        accept = min(1.0, target[token] / draft[token]) if draft[token] else 0.0
        for u, expected in ((accept * (1 - 1e-9), (0,)), (accept * (1 + 1e-9), ())):
            if u < 1 and accept > 1e-200:
                walk = walk_rejection(one, lambda _: target, lambda _, u=u: u)
                assert walk.path == expected
        walk = walk_rejection(one, lambda _: target, lambda _: 1 - 2.0**-53)
        total[token] += draft[token] * accept
        if accept < 1 and not walk.path:
            total += draft[token] * (1 - accept) * walk.law / walk.law.sum()
    assert np.abs(total - target).max() < 1e-12


def test_equal_laws_accept_always_and_never_leave_an_empty_residual() -> None:
    law = np.array([0.1, 0.2, 0.7])
    chain = proposal_of([1, 2], [-1, 0], [law.tolist()] * 2, [0, 1])
    for rule in (walk_rejection, walk_block):
        for u in (0.0, 0.5, 1 - 2.0**-53):
            walk = rule(chain, lambda _: law, lambda _, u=u: u)
            assert walk.path == (0, 1)
            assert walk.law.sum() == pytest.approx(1)


def test_an_exhausted_draft_law_passes_its_children_over() -> None:
    target = np.array([0.2, 0.3, 0.5])
    extra = proposal_of([0, 1], [-1, -1], [[1.0, 0.0, 0.0]], [0, 0])
    walk = walk_rejection(extra, lambda _: target, lambda _: 0.9)
    assert walk.path == ()
    assert walk.law.tolist() == pytest.approx([0, 0.375, 0.625])


def test_a_walk_asks_only_for_the_laws_it_needs() -> None:
    asked: list[int] = []

    def law(row: int) -> np.ndarray:
        asked.append(row)
        return np.array([0.5, 0.5])

    binary = proposal_of(
        [0, 1, 0, 1, 0, 1], [-1, -1, 0, 0, 1, 1], [[0.5, 0.5]] * 3, [0] * 2 + [1] * 2 + [2] * 2
    )
    assert walk_rejection(binary, law, lambda _: 0.5).path == (0, 2)
    assert asked == [0, 1, 3]


def test_block_refuses_trees_and_names_the_rule() -> None:
    pair = proposal_of([0, 1], [-1, -1], [[0.5, 0.5]], [0, 0])
    with pytest.raises(ConfigError, match="rule 'block'"):
        walk_block(pair, lambda _: np.ones(2) / 2, lambda _: 0.5)


@pytest.mark.parametrize(
    ("law", "law_of", "token", "error"),
    [
        ([0.5, 0.5], [], 0, ShapeError),
        ([0.5, 0.5], [1], 0, ShapeError),
        ([0.5, 0.5], [-2], 0, ShapeError),
        ([0.5, 0.5], [0], 2, ShapeError),
        ([0.5, 0.25, 0.25], [0], 0, ShapeError),
        ([0.0, 0.0], [0], 0, DataError),
        ([float("nan"), 1.0], [0], 0, DataError),
        ([-0.5, 1.5], [0], 0, DataError),
    ],
)
def test_a_proposal_that_does_not_fit_is_an_error(
    law: list[float], law_of: list[int], token: int, error: type[Exception]
) -> None:
    bad = proposal_of([token], [-1], [law], law_of)
    for rule in (walk_rejection, walk_block):
        with pytest.raises(error):
            rule(bad, lambda _: np.ones(2) / 2, lambda _: 0.5)


def random_pair(seed: int, size: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(1, size, generator=g) * 2
    draft = target + torch.randn(1, size, generator=g) * spread
    return target.log_softmax(-1), draft.log_softmax(-1)


def test_a_coupled_chain_agrees_at_least_as_often_as_the_bound() -> None:
    """Daliri, Musco, Suresh 2024: (1 - TV) / (1 + TV)."""
    n = 5000
    keys, at = [NoiseKey(s) for s in range(n)], [0] * n
    for seed in range(6):
        target, draft = random_pair(seed, 12, 0.3 + 0.4 * seed)
        tv = 0.5 * float((target.exp() - draft.exp()).abs().sum())
        same = perturbed_argmax(target.expand(n, -1), keys, at) == perturbed_argmax(
            draft.expand(n, -1), keys, at
        )
        bound = (1 - tv) / (1 + tv)
        assert float(same.double().mean()) > bound - 4 * np.sqrt(bound * (1 - bound) / n)


def accepted_of_four(target: np.ndarray, draft: np.ndarray, ids: np.ndarray) -> float:
    """Probability that rejection without replacement accepts one of the drawn candidates."""
    rows = np.arange(len(ids))
    p, q = np.tile(target, (len(ids), 1)), np.tile(draft, (len(ids), 1))
    missed = np.ones(len(ids))
    for column in ids.T:
        missed *= 1 - np.minimum(1, p[rows, column] / q[rows, column])
        p = np.maximum(p - q, 0)
        p /= np.maximum(p.sum(axis=1, keepdims=True), 1e-300)
        q[rows, column] = 0
        q /= q.sum(axis=1, keepdims=True)
    return float(1 - missed.mean())


def test_on_close_laws_the_coupled_top_four_beats_rejection_with_four() -> None:
    n = 1500
    keys, at = [NoiseKey(s) for s in range(n)], [0] * n
    coupled, rejected = [], []
    for seed in range(20):
        target, draft = random_pair(100 + seed, 40, 0.2 + 0.05 * seed)
        if 0.5 * float((target.exp() - draft.exp()).abs().sum()) > 0.5:
            continue
        wanted = perturbed_argmax(target.expand(n, -1), keys, at)
        best, _ = perturbed_topk(draft.expand(n, -1), keys, at, 4)
        coupled.append(float((best == wanted[:, None]).any(dim=1).double().mean()))
        ids, _ = draft_topk(draft.expand(n, -1), keys, at, [-1] * n, 4)
        laws = [x.double().softmax(-1)[0].numpy() for x in (target, draft)]
        rejected.append(accepted_of_four(*laws, ids.numpy()))
    assert len(coupled) >= 10
    assert np.mean(coupled) > np.mean(rejected)


def test_sample_match_does_not_agree_with_the_coupled_noise() -> None:
    n = 4000
    keys, at = [NoiseKey(s) for s in range(n)], [0] * n
    flat = torch.zeros(n, 10)
    match = perturbed_argmax(flat, keys, at, stream=Stream.MATCH)
    same = float((match == perturbed_argmax(flat, keys, at)).double().mean())
    assert abs(same - 0.1) < 4 * np.sqrt(0.09 / n)
