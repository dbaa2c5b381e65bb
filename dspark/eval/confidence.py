"""How far a drafter's own survival can be trusted: ECE, AUROC, Brier, reliability.

What is judged is the tree's likeliest chain (from depth 1 on, always the child of highest
survival; of a chain, the chain itself): at depth d the drafter said that verification would come
to that node and accept it with probability `survival`, and it did or did not. Which chain is looked
at follows from what the drafter said alone, so outcomes do not select it.

    prefix      survival of the node at depth d / every node above it and itself accepted
    step        survival / its parent's survival, in rounds that accepted the parent / accepted

**Source:** Guo et al. 2017 (ECE); Brier 1950; AUROC as the Mann-Whitney statistic, ties half.
`prefix` per position with 20 bins of equal width is DeepSpec's measure,
`deepspec/eval/dspark/confidence_head.py: PerPositionConfidenceMetrics` (its AUROC is taken from
1000 bins, ours from ranks).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark.request import RoundStats

__all__ = ["BINS", "auroc", "brier", "calibration", "confidence", "reliability"]

BINS = 20
"""Bins of equal width of ECE and reliability curves."""

FloatArray = NDArray[np.float64]


def reliability(
    predicted: FloatArray, outcome: FloatArray, *, bins: int = BINS
) -> list[dict[str, Any]]:
    """The reliability curve: of predictions in each bin, their mean and how many came true.

    Args:
        predicted: float64 [N] in [0, 1].
        outcome: float64 [N], 0 or 1.
        bins: Bins of equal width; 1 belongs to the last.

    Returns:
        One entry per bin that is not empty: from, to, count, predicted, observed.
    """
    index = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    curve = []
    for at in np.unique(index).tolist():
        inside = index == at
        curve.append(
            {
                "from": at / bins,
                "to": (at + 1) / bins,
                "count": int(inside.sum()),
                "predicted": float(predicted[inside].mean()),
                "observed": float(outcome[inside].mean()),
            }
        )
    return curve


def ece_of(curve: Sequence[dict[str, Any]]) -> float | None:
    """Expected calibration error of a reliability curve; None without a prediction."""
    total = sum(row["count"] for row in curve)
    gap = sum(row["count"] * abs(row["predicted"] - row["observed"]) for row in curve)
    return gap / total if total else None


def auroc(predicted: FloatArray, outcome: FloatArray) -> float | None:
    """Probability that one that came true had the higher prediction, ties half.

    Args:
        predicted: float64 [N].
        outcome: float64 [N], 0 or 1.

    Returns:
        In [0, 1]; None if all outcomes are the same.
    """
    hits = int(outcome.sum())
    misses = len(outcome) - hits
    if hits == 0 or misses == 0:
        return None
    _, inverse, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[inverse]  # from 1, ties share their mean
    return float((ranks[outcome > 0].sum() - hits * (hits + 1) / 2) / (hits * misses))


def brier(predicted: FloatArray, outcome: FloatArray) -> float | None:
    """Mean squared error of the predictions; None without one."""
    return float(np.mean((predicted - outcome) ** 2)) if len(predicted) else None


def calibration(pairs: Iterable[tuple[float, bool]], *, bins: int = BINS) -> dict[str, Any]:
    """All measures of a set of predictions.

    Args:
        pairs: (predicted probability, whether it came true).
        bins: Bins of ECE and of the reliability curve.

    Returns:
        JSON values: count, predicted and observed means, ece, auroc, brier, reliability.
    """
    table = np.array(list(pairs), dtype=np.float64).reshape(-1, 2)
    predicted, outcome = table[:, 0], table[:, 1]
    curve = reliability(predicted, outcome, bins=bins)
    return {
        "count": len(table),
        "predicted": float(predicted.mean()) if len(table) else None,
        "observed": float(outcome.mean()) if len(table) else None,
        "ece": ece_of(curve),
        "auroc": auroc(predicted, outcome),
        "brier": brier(predicted, outcome),
        "reliability": curve,
    }


def confidence(rounds: Sequence[RoundStats]) -> dict[str, Any] | None:
    """Confidence quality, all depths together and each by itself.

    Args:
        rounds: Rounds of one configuration: one drafter, one rule, one temperature.

    Returns:
        JSON values, or None if no round had a draft.
    """
    depth = max((len(item.survival) for item in rounds), default=0)
    if depth == 0:
        return None
    prefix = [_prefix(rounds, d) for d in range(depth)]
    step = [_step(rounds, d) for d in range(depth)]
    return {
        "bins": BINS,
        "prefix": calibration(pair for pairs in prefix for pair in pairs),
        "step": calibration(pair for pairs in step for pair in pairs),
        "per_position": [
            {"position": d + 1, "prefix": calibration(prefix[d]), "step": calibration(step[d])}
            for d in range(depth)
        ],
    }


def _prefix(rounds: Sequence[RoundStats], d: int) -> list[tuple[float, bool]]:
    return [(item.survival[d], item.matched > d) for item in rounds if len(item.survival) > d]


def _step(rounds: Sequence[RoundStats], d: int) -> list[tuple[float, bool]]:
    pairs = []
    for item in rounds:
        if len(item.survival) <= d or item.matched < d:
            continue
        above = item.survival[d - 1] if d else 1.0
        if above > 0:
            pairs.append((item.survival[d] / above, item.matched > d))
    return pairs
