"""Proposals under a constraint: what is ruled out leaves the tree, what is certain enters it.

**Ruled out.** A candidate that follows from the context (all of them where tokens are compared,
POINT_MASS nodes where laws are) has no mass in the target's law if the constraint forbids it: it
would be rejected for certain and leave the law as it was, so it may go before it costs a row. A
token drawn from a law may not: that it was drawn changes what is left for the tokens after it. A
drafter that draws under the mask draws nothing of that kind.

**Certain.** At a forced position the target's law has all its mass on one token, so a node that
offers it with certainty is accepted under every rule. A chain of them comes before the drafter's
nodes. Candidates that a drafter had for these positions itself go: others than the forced token
would be rejected and leave the law as it was, drawn or not, since there is nothing left for any
other token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark.tree import POINT_MASS, DraftTree, Proposal
from dspark.verify.constraint import AllowedAfter

__all__ = ["GRAMMAR", "behind", "hang", "without_forbidden"]

GRAMMAR = "grammar"
"""`Proposal.source` of forced nodes."""


def without_forbidden(proposal: Proposal, allowed: AllowedAfter) -> Proposal:
    """Remove candidates that the constraint rules out, and what hangs from them.

    Args:
        proposal: N nodes.
        allowed: The masks, of paths that begin where the tree does.

    Returns:
        The smaller proposal; `proposal` itself if nothing is ruled out.

    Raises:
        DsparkError: If the constraint cannot tell.
    """
    tree = proposal.tree
    is_drawn = (proposal.law_of != POINT_MASS).tolist() or [False] * tree.num_nodes
    paths: dict[int, tuple[int, ...]] = {-1: ()}
    keep = np.zeros(tree.num_nodes, dtype=np.bool_)
    for node, (token, parent) in enumerate(
        zip(tree.token.tolist(), tree.parent.tolist(), strict=True)
    ):
        above = paths.get(parent)
        if above is None:
            continue
        mask = None if is_drawn[node] else allowed(above)
        if mask is None or (token < len(mask) and mask[token]):
            keep[node] = True
            paths[node] = (*above, token)
    return proposal.subtree(keep)


def behind(proposal: Proposal, forced: Sequence[int]) -> Proposal:
    """What a proposal offers behind forced tokens, as a tree of its own.

    Args:
        proposal: Of the same anchor.
        forced: The tokens.

    Returns:
        The part that hangs from the node of the last of them, empty if there is none; survival is
        given that this node is accepted.
    """
    tree = proposal.tree
    tokens, parents = tree.token.tolist(), tree.parent.tolist()
    root = -1
    for wanted in forced:
        found = (n for n, parent in enumerate(parents) if parent == root and tokens[n] == wanted)
        root = next(found, -2)
        if root == -2:
            return Proposal.empty()
    if root < 0:
        return proposal
    index = {root: -1}
    kept: list[int] = []
    for node, parent in enumerate(parents):
        if parent in index:
            index[node] = len(kept)
            kept.append(node)
    above = float(tree.survival[root])
    share = tree.survival[kept] / above if above > 0 else np.zeros(len(kept))
    part = DraftTree(
        tree.token[kept],
        np.array([index[parents[node]] for node in kept], dtype=np.int64),
        tree.depth[kept] - len(forced),
        np.minimum(share, 1.0),
    )
    law_of = proposal.law_of[kept] if len(proposal.law_of) else proposal.law_of
    source = tuple(proposal.source[node] for node in kept) if proposal.source else ()
    return Proposal(part, proposal.laws, law_of, source)


def hang(forced: Sequence[int], proposal: Proposal, *, draws_from_laws: bool) -> Proposal:
    """A chain of forced tokens with a proposal behind it.

    Args:
        forced: The tokens; they become the first nodes, with survival 1.
        proposal: What hangs from the last of them.
        draws_from_laws: Whether the request's rule needs every node's law.

    Returns:
        The whole; `proposal` itself if no token is forced.
    """
    count, tree = len(forced), proposal.tree
    if not count:
        return proposal
    whole = DraftTree(
        np.concatenate([np.array(forced, dtype=np.int64), tree.token]),
        np.concatenate([np.arange(-1, count - 1), tree.parent + count]),
        np.concatenate([np.arange(1, count + 1), tree.depth + count]),
        np.concatenate([np.ones(count), tree.survival]),
    )
    law_of = proposal.law_of
    if draws_from_laws:
        law_of = np.concatenate([np.full(count, POINT_MASS, dtype=np.int64), law_of])
    source = (GRAMMAR,) * count + proposal.source if proposal.source else ()
    return Proposal(whole, proposal.laws, law_of, source)
