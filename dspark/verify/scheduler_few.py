"""The search of `dspark.verify.scheduler` over a handful of nodes, in plain numbers.

A round runs between two forwards, and these leave nothing else in the caches: some thirty
operations of numpy on ten numbers each take several times as long as lists do. The sums are made in
the same order, so both admit the same nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from dspark.tree import BoolArray

__all__ = ["FEW", "search_few"]

FEW = 64
"""Nodes of a round up to which lists are faster."""


def search_few(
    survival: Sequence[float],
    sizes: Sequence[int],
    weights: Sequence[float],
    rates: Sequence[float],
    value: float,
) -> list[tuple[BoolArray | None, float, float]]:
    """Admit the prefix of best nodes that makes Theta largest, the shortest among equals.

    Args:
        survival: Of the nodes of all offers end to end, [N].
        sizes: Nodes of each offer; they sum to N.
        weights: Priority of each.
        rates: Rounds per second with 0, 1, ... N nodes, [N + 1].
        value: Weighted tokens of a round without them.

    Returns:
        Of each offer, the fields of a `dspark.verify.scheduler.Cut`: the nodes kept (None for all),
        the survival of the best node, the gain.
    """
    worth = survival
    if any(weight != 1 for weight in weights):
        of_node = [weight for weight, size in zip(weights, sizes, strict=True) for _ in range(size)]
        worth = [v * weight for v, weight in zip(survival, of_node, strict=True)]
    order = sorted(range(len(worth)), key=[-v for v in worth].__getitem__)  # ancestors first
    sums = accumulate(worth[node] for node in order)
    thetas = [value * rates[0]]
    thetas += ((s + value) * rate for s, rate in zip(sums, rates[1:], strict=True))
    total = thetas.index(max(thetas))
    admitted = [False] * len(worth)
    for node in order[:total]:
        admitted[node] = True
    each = value * (rates[0] / rates[total] - 1) / max(total, 1)  # the time of a node's row
    found: list[tuple[BoolArray | None, float, float]] = []
    start = 0
    for size in sizes:
        stop = start + size
        keep = admitted[start:stop]
        gain = sum(v - each for v, kept in zip(worth[start:stop], keep, strict=True) if kept)
        first = max(survival[start:stop], default=0.0)
        mask = None if all(keep) else np.array(keep, dtype=np.bool_)
        found.append((mask, first, float(gain)))
        start = stop
    return found
