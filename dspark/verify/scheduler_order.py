"""Siblings in the order in which the scheduler comes to them.

Under the rejection rule a candidate's presence must not depend on the token of a sibling that is
judged after it. The scheduler goes down nodes in falling survival, so siblings have to be judged in
falling survival too; and children drawn from one law without replacement must stay in draw order
without gaps. What one drafter drew satisfies both; where two drafters' candidates stand under one
parent the orders may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark.tree import POINT_MASS, DraftTree, Proposal

__all__ = ["in_judging_order"]


def in_judging_order(proposals: Sequence[Proposal]) -> list[Proposal]:
    """Renumber nodes so that siblings stand in falling survival.

    A child drawn from the same law as an earlier sibling is held to that one's survival first, so
    that draw order survives. Everything that decides about the order is known before the tokens in
    question are drawn, if survival is.

    Args:
        proposals: Of rules that draw from laws.

    Returns:
        The same nodes; a proposal itself if its nodes are in order already.
    """
    ordered = list(proposals)
    sizes = [len(proposal.tree.token) for proposal in proposals]
    if not sum(sizes):
        return ordered
    owner = np.repeat(np.arange(len(sizes)), sizes)
    # One number per parent, the anchors' included: a tree of n nodes has n + 1.
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]]) + np.arange(len(sizes))
    parent = np.concatenate([proposal.tree.parent for proposal in proposals]) + first[owner]
    survival = np.concatenate([proposal.tree.survival for proposal in proposals])
    order = np.argsort(parent, kind="stable")
    parent, survival = parent[order], survival[order]
    rises = (parent[1:] == parent[:-1]) & (survival[1:] > survival[:-1])
    for place in set(owner[order[1:][rises]].tolist()):
        ordered[place] = _in_order(proposals[place])
    return ordered


def _in_order(proposal: Proposal) -> Proposal:
    """One proposal whose siblings' survival rises somewhere."""
    tree = proposal.tree
    parents, laws = tree.parent.tolist(), proposal.law_of.tolist()
    worth: list[float] = []
    of_law: dict[tuple[int, int], float] = {}  # survival of the newest child drawn from a law
    for node, value in enumerate(tree.survival.tolist()):
        parent, law = parents[node], laws[node] if laws else POINT_MASS
        held = value if parent < 0 else min(value, worth[parent])
        if law != POINT_MASS:
            held = of_law[parent, law] = min(held, of_law.get((parent, law), 1.0))
        worth.append(held)
    order = sorted(range(len(worth)), key=lambda node: (-worth[node], node))
    return _renumbered(proposal, order, worth)


def _renumbered(proposal: Proposal, order: list[int], worth: list[float]) -> Proposal:
    """The nodes in this order (parents first), with these survivals."""
    tree, picked = proposal.tree, np.array(order, dtype=np.int64)
    place = np.empty(len(order) + 1, dtype=np.int64)
    place[picked] = np.arange(len(order))
    place[-1] = -1  # where parent -1 reads
    moved = DraftTree(
        tree.token[picked],
        place[tree.parent[picked]],
        tree.depth[picked],
        np.array(worth, dtype=np.float64)[picked],
    )
    law_of = proposal.law_of[picked] if len(proposal.law_of) else proposal.law_of
    source = tuple(proposal.source[node] for node in order) if proposal.source else ()
    return Proposal(moved, proposal.laws, law_of, source)
