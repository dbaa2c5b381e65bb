"""What the log of rounds keeps of each: made where the round ends, read by `dspark.eval`."""

from __future__ import annotations

from itertools import takewhile

from dspark.request import RoundStats
from dspark.round_draft import Drafted
from dspark.tree import DraftTree
from dspark.verify.verifier import Verdict

__all__ = ["round_stats"]


def round_stats(draft: Drafted, verdict: Verdict, *, accepted: int, committed: int) -> RoundStats:
    """What the log keeps of a request's round.

    Args:
        draft: What was verified.
        verdict: What the verifier said.
        accepted: Drafted tokens that were committed.
        committed: Tokens that were committed.

    Returns:
        The entry.
    """
    tree = draft.proposal.tree
    chain = _likeliest_chain(tree)
    # Where the text ended inside the path, what lies deeper was decided for nobody.
    end = accepted if committed <= len(verdict.path) else tree.max_depth
    pairs = zip(chain[:end], verdict.path, strict=False)
    return RoundStats(
        proposed=draft.forced + draft.offered,
        verified=tree.num_nodes,
        accepted=accepted,
        committed=committed,
        depth=tree.max_depth,
        tried=min(verdict.tried_depth, end),
        path=len(verdict.path),
        survival=tuple(float(tree.survival[node]) for node in chain[:end]),
        matched=sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)),
        nodes=_nodes(tree, frozenset(verdict.path), end) if tree.num_nodes > tree.max_depth else (),
        forced=draft.forced,
    )


def _nodes(
    tree: DraftTree, path: frozenset[int], depth: int
) -> tuple[tuple[int, float, bool], ...]:
    """Parent, survival and acceptance of the nodes down to a depth."""
    kept = [node for node, own in enumerate(tree.depth.tolist()) if own <= depth]
    place = {node: i for i, node in enumerate(kept)} | {-1: -1}
    parent, survival = tree.parent.tolist(), tree.survival.tolist()
    return tuple((place[parent[node]], survival[node], node in path) for node in kept)


def _likeliest_chain(tree: DraftTree) -> list[int]:
    """Nodes from depth 1 on, always the child of highest survival (ties: the first)."""
    best: dict[int, int] = {}  # parent -> its likeliest child
    survival = tree.survival.tolist()
    for node, parent in enumerate(tree.parent.tolist()):
        if parent not in best or survival[node] > survival[best[parent]]:
            best[parent] = node
    chain: list[int] = []
    while (node := best.get(chain[-1] if chain else -1, -1)) >= 0:
        chain.append(node)
    return chain
