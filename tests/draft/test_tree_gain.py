"""What a tree is worth, on a toy target whose law a draft knows exactly."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

from dspark.draft.dspark import DSparkDrafter, DSparkDrafterConfig
from dspark.request import Rule, SamplingParams
from dspark.tree import Proposal
from dspark.tree_build import best_first
from dspark.verify.noise import NoiseKey
from dspark.verify.verifier import VerifyJob, verify
from tests.draft.dspark_models import VOCAB, make_features, make_module

DEPTH = 4


@functools.cache
def markov_law() -> np.ndarray:
    """The target: the next token depends on the last one only; [VOCAB, VOCAB]."""
    logits = np.random.default_rng(2).normal(size=(VOCAB, VOCAB)) * 3.5
    law = np.exp(logits - logits.max(1, keepdims=True))
    return law / law.sum(1, keepdims=True)


@functools.cache
def perfect_drafter() -> DSparkDrafter:
    """Base logits are zero and W2 W1 is the target's table of log-probabilities."""
    module = make_module(head="none", markov_rank=VOCAB, markov_head_type="vanilla")
    module.lm_head.weight.zero_()
    module.markov_head.markov_w1.weight.copy_(torch.eye(VOCAB))
    module.markov_head.markov_w2.weight.copy_(torch.from_numpy(np.log(markov_law()).T.copy()))
    config = DSparkDrafterConfig(width=8, beams=40, min_survival=0.0)
    return DSparkDrafter(module, config=config)


def trees(make_context, budget: int) -> list:
    """The drafter's tree after every anchor."""
    contexts = [
        make_context(
            [1, 2, anchor],
            request_id=anchor,
            rule=Rule.SAMPLE_MATCH,
            budget=budget,
            depth=DEPTH,
            features=make_features(2),
        )
        for anchor in range(VOCAB)
    ]
    proposals = perfect_drafter().propose(contexts)
    for context in contexts:
        perfect_drafter().release(context.request_id)
    return [proposal.tree for proposal in proposals]


def marginal_tree(anchor: int, budget: int):
    """The best tree of a draft that knows the law of every position, but not of branches."""
    marginals, laws = np.eye(VOCAB)[anchor], []
    for _ in range(DEPTH):
        marginals = marginals @ markov_law()
        order = np.argsort(-marginals)[:8]
        laws.append((order.tolist(), marginals[order].tolist()))
    return best_first(
        lambda grown, nodes: [laws[0 if n < 0 else grown.depth[n]] for n in nodes],
        budget=budget,
        depth=DEPTH,
        width=8,
    )


def worth(tree, anchor: int) -> float:
    """Expected accepted tokens of a tree under the target: the sum of its paths' probabilities."""
    law, total = markov_law(), 0.0
    for node in range(tree.num_nodes):
        path = [anchor, *tree.path_tokens(node)]
        total += float(np.prod([law[a, b] for a, b in itertools.pairwise(path)]))
    return total


@pytest.mark.parametrize("budget", [4, 15, pytest.param(31, marks=pytest.mark.slow)])
def test_a_conditioned_tree_beats_the_tree_of_marginals(make_context, budget):
    conditioned = np.array([worth(t, a) for a, t in enumerate(trees(make_context, budget))])
    marginal = np.array([worth(marginal_tree(a, budget), a) for a in range(VOCAB)])
    assert (conditioned >= marginal - 1e-6).all()
    assert conditioned.mean() > 1.05 * marginal.mean()


def test_survival_of_a_perfect_draft_is_the_probability_of_acceptance(make_context):
    for anchor, tree in enumerate(trees(make_context, 15)):
        assert tree.survival.sum() == pytest.approx(worth(tree, anchor), rel=1e-4)


def test_tau_is_what_survival_says(make_context):
    """5760 rounds through the real verifier; anchors follow each other evenly.

    The standard error of the mean is 0.005 of tau, given the seeds the outcome is fixed.
    """
    params = SamplingParams(temperature=1.0)
    log_law = torch.from_numpy(np.log(markov_law())).float()
    grown = trees(make_context, 15)
    committed = expected = rounds = 0
    for turn in range(60):
        jobs, rows = [], []
        for anchor, tree in enumerate(grown):
            jobs.append(
                VerifyJob(
                    start=len(rows),
                    params=params,
                    rule=Rule.SAMPLE_MATCH,
                    noise=NoiseKey(turn * VOCAB + anchor),
                    position=3,
                    proposal=Proposal(tree),
                )
            )
            rows += [anchor, *tree.token.tolist()]
            expected += 1 + tree.survival.sum()
        verdicts = verify(log_law[torch.tensor(rows)], jobs)
        committed += sum(len(verdict.path) + 1 for verdict in verdicts)
        rounds += len(jobs)
    tau = committed / rounds
    assert tau > 1.8
    assert tau == pytest.approx(expected / rounds, rel=0.01)
