"""Two proposals for one request become one (SpecInfer's merged token trees, arXiv 2305.09781).

Letters: N nodes, P laws, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from dspark.errors import ShapeError
from dspark.tree import DraftTree, FloatArray, IntArray, Proposal

__all__ = ["limit_width", "merge"]


def merge(first: Proposal, second: Proposal, *, keep_duplicates: bool) -> Proposal:
    """Lay a second tree over a first.

    Without duplicates (greedy, coupled, sample-match: a candidate counts by its token alone) nodes
    with the same token under the same parent become one. Its survival is the LARGER of the two:
    both are estimates of one event, not two chances at it, so 1 - (1 - a)(1 - b) would claim too
    much. Where the children of a node then claim more than the node has, they are scaled down.

    With duplicates (rejection) every node stays, since each candidate is judged against the law it
    was drawn from: first's candidates come first, each keeps its own law, and second's survival
    is scaled by the chance that first's candidates at depth 1 have all been rejected.

    Args:
        first: The proposal whose candidates come first.
        second: The other one.
        keep_duplicates: Whether equal tokens under one parent stay apart.

    Returns:
        The union; first's nodes keep their indices.

    Raises:
        ShapeError: If `keep_duplicates` and a node has no law, or vocabularies differ.
    """
    if keep_duplicates:
        return _append(first, second)
    if not second.tree.num_nodes:
        return first
    if not first.tree.num_nodes:
        return second
    tree, added = _unify(first.tree, second.tree)
    source: tuple[str, ...] = ()
    if first.source and second.source:
        source = first.source + tuple(second.source[node] for node in added)
    return Proposal(tree, source=source)


def _unify(first: DraftTree, second: DraftTree) -> tuple[DraftTree, list[int]]:
    """The united tree, and which of second's nodes were new."""
    tokens, parents = first.token.tolist(), first.parent.tolist()
    survival = first.survival.tolist()
    place = {
        key: node for node, key in reversed(list(enumerate(zip(parents, tokens, strict=True))))
    }
    index: dict[int, int] = {-1: -1}
    added = []
    rows = zip(second.token.tolist(), second.parent.tolist(), second.survival.tolist(), strict=True)
    for node, (token, above, value) in enumerate(rows):
        key = (index[above], token)
        known = place.get(key)
        if known is None:
            known = place[key] = len(tokens)
            tokens.append(token)
            parents.append(key[0])
            survival.append(value)
            added.append(node)
        else:
            survival[known] = max(survival[known], value)
        index[node] = known
    return _coherent(tokens, parents, survival), added


def _coherent(tokens: list[int], parents: list[int], survival: list[float]) -> DraftTree:
    """Scale children down where together they claim more than their parent has."""
    size = len(tokens)
    claimed = [0.0] * (size + 1)  # by the children of each node; the anchor's at -1
    for parent, value in zip(parents, survival, strict=True):
        claimed[parent] += value
    factor = [1.0] * (size + 1)  # for the children of each node
    factor[-1] = 1.0 / max(1.0, claimed[-1])
    depth = [0] * (size + 1)
    worth = [1.0] * (size + 1)
    for node, parent in enumerate(parents):
        scale, above = factor[parent], worth[parent]
        value = survival[node] * scale
        worth[node] = value = value if value < above else above
        depth[node] = depth[parent] + 1
        below = claimed[node]
        factor[node] = value / below if below * scale > value else scale
    return DraftTree(
        np.array(tokens, dtype=np.int64),
        np.array(parents, dtype=np.int64),
        np.array(depth[:size], dtype=np.int64),
        np.array(worth[:size], dtype=np.float64),
    )


def _append(first: Proposal, second: Proposal) -> Proposal:
    for proposal in (first, second):
        if len(proposal.law_of) != proposal.tree.num_nodes:
            raise ShapeError(
                f"a proposal of {proposal.tree.num_nodes} nodes names {len(proposal.law_of)} laws, "
                "but the rejection rule needs one for every node."
            )
    if not second.tree.num_nodes:
        return first
    if not first.tree.num_nodes:
        return second
    a, b = first.tree, second.tree
    left = max(0.0, 1.0 - float(a.survival[a.parent < 0].sum()))
    tree = DraftTree(
        np.concatenate([a.token, b.token]),
        np.concatenate([a.parent, np.where(b.parent < 0, -1, b.parent + a.num_nodes)]),
        np.concatenate([a.depth, b.depth]),
        np.concatenate([a.survival, b.survival * left]),
    )
    laws, offset = _stack(first.laws, second.laws)
    law_of = np.concatenate([first.law_of, np.where(second.law_of < 0, -1, second.law_of + offset)])
    source = first.source + second.source if first.source and second.source else ()
    return Proposal(tree, laws, law_of, source)


def _stack(
    first: torch.Tensor | None, second: torch.Tensor | None
) -> tuple[torch.Tensor | None, int]:
    """Both laws below each other, and where the second's begin."""
    if first is None or second is None:
        return (second, 0) if first is None else (first, 0)
    if first.shape[1] != second.shape[1]:
        raise ShapeError(
            f"laws over {first.shape[1]} and {second.shape[1]} tokens cannot be merged."
        )
    dtype = torch.promote_types(first.dtype, second.dtype)
    return torch.cat([first.to(dtype), second.to(dtype)]), int(first.shape[0])


def limit_width(proposal: Proposal, width: int, *, by_survival: bool) -> Proposal:
    """Keep at most `width` children of every node, and what hangs from them.

    Args:
        proposal: What to cut.
        width: Children per node at the most, >= 1.
        by_survival: True keeps the children of highest survival, False the first in draw order
            (which is all that the rejection rule allows).

    Returns:
        The smaller proposal.
    """
    tree = proposal.tree
    parents: IntArray = tree.parent
    if tree.num_nodes <= width or np.bincount(parents + 1).max() <= width:
        return proposal
    worth: FloatArray = tree.survival if by_survival else -np.arange(tree.num_nodes, dtype=float)
    taken: dict[int, int] = {}
    keep = np.zeros(tree.num_nodes, dtype=np.bool_)
    for node in np.argsort(-worth, kind="stable").tolist():
        parent = int(parents[node])
        rank = taken[parent] = taken.get(parent, 0) + 1
        keep[node] = rank <= width
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0 and not keep[parent]:
            keep[node] = False
    return proposal.subtree(keep)
