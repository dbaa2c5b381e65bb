"""How well survival maps hold on prompts they were not fitted on: ECE by position and by rank.

By position, the path of first children, which of a chain is all of it: survival down to there
against whether the path was accepted down to there. Four estimates are judged on the same rounds:

    unfitted     survival as the draft states it without a map
    confidence   the product of the confidence head's own chances (null without such a head)
    scaled       the same with sequential temperature scaling alone
    fitted       the map

Every round is judged by what was fitted on other questions than its own (`Judged`), and all rounds
are judged together.

By rank, the children of reached nodes: the chance rho of each against whether it was accepted.

`floor` is what the ECE of a perfect estimate would come to with as many samples
(`calibrate_fit.ece_floor`). An ECE near it cannot be told from 0.

Letters: N rounds, D depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dspark.draft.calibration import SurvivalMap
from dspark.eval.calibrate_fit import ece_floor, path_logits, scaled_survival
from dspark.eval.calibrate_record import Family, FirstPaths, Observations
from dspark.eval.confidence import calibration, ece_of, reliability
from dspark.tree import FloatArray

__all__ = ["Judged", "by_position", "by_rank"]


@dataclass(frozen=True, slots=True)
class Judged:
    """Rounds, and what is judged by them.

    Attributes:
        seen: Rounds that nothing was fitted on.
        rating: The map.
        scaling: Temperatures of the confidence head alone, [D] or longer; None without a head.
    """

    seen: Observations
    rating: SurvivalMap
    scaling: FloatArray | None

    def paths(self) -> dict[str, FloatArray]:
        """Survival along the paths of first children by each estimate there is, [N, D]."""
        paths = self.seen.paths
        depth = paths.accepted.shape[1]
        found = {
            "unfitted": paths.survival,
            "fitted": scaled_survival(path_logits(self.rating, paths), np.ones(depth)),
        }
        if self.scaling is not None:
            held = self.scaling[np.minimum(np.arange(depth), len(self.scaling) - 1)]
            found["confidence"] = scaled_survival(paths.confidence, np.ones(depth))
            found["scaled"] = scaled_survival(paths.confidence, held)
        return found


def by_position(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Quality along the path of first children.

    Args:
        judged: All rounds.

    Returns:
        One entry a position: position, count, observed, predicted, ece of the four estimates,
        floor, auroc and brier of the map.
    """
    found = []
    estimates = [(part.seen.paths, part.paths()) for part in judged]
    depth = max((paths.accepted.shape[1] for paths, _ in estimates), default=0)
    for column in range(depth):
        outcome, own = _column(estimates, column)
        fitted = own["fitted"]
        verdict = calibration(zip(fitted.tolist(), (outcome > 0).tolist(), strict=True))
        errors = {
            name: _ece(own[name], outcome) if name in own else None
            for name in ("unfitted", "confidence", "scaled", "fitted")
        }
        found.append(
            {
                "position": column + 1,
                "count": verdict["count"],
                "observed": verdict["observed"],
                "predicted": verdict["predicted"],
                "ece": errors,
                "floor": ece_floor(fitted),
                "auroc": verdict["auroc"],
                "brier": verdict["brier"],
            }
        )
    return found


def _column(
    estimates: Sequence[tuple[FirstPaths, dict[str, FloatArray]]], column: int
) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Outcomes of a position where they are known, and what all parts have an estimate of."""
    outcome, own = [], []
    for paths, found in estimates:
        if column < paths.accepted.shape[1]:
            rows = np.flatnonzero(~np.isnan(paths.accepted[:, column]))
            outcome.append(paths.accepted[rows, column])
            own.append({name: table[rows, column] for name, table in found.items()})
    shared = set.intersection(*(set(part) for part in own))
    return np.concatenate(outcome), {
        name: np.concatenate([part[name] for part in own]) for name in shared
    }


def by_rank(judged: Sequence[Judged], *, is_drawn: bool) -> list[dict[str, Any]]:
    """Quality of rho among the children of reached nodes.

    Args:
        judged: All rounds.
        is_drawn: True for rules that draw from laws.

    Returns:
        One entry a rank: rank (from 1), count, observed, predicted, ece of the draft's own estimate
        and of the map, floor.
    """
    pairs: dict[int, list[tuple[float, float, bool]]] = {}
    for part in judged:
        for family in part.seen.families:
            if not family.is_reached or not family.children.tokens:
                continue
            before = _own_rates(family)
            after = _rates(part.rating, family, is_drawn=is_drawn)
            for rank in range(len(family.children.tokens)):
                entry = (before[rank], after[rank], rank == family.hit)
                pairs.setdefault(rank, []).append(entry)
    found = []
    for rank in sorted(pairs):
        table = np.array(pairs[rank], dtype=np.float64)
        before, after, outcome = table.T
        found.append(
            {
                "rank": rank + 1,
                "count": len(table),
                "observed": float(outcome.mean()),
                "predicted": float(after.mean()),
                "ece": {"unfitted": _ece(before, outcome), "fitted": _ece(after, outcome)},
                "floor": ece_floor(after),
            }
        )
    return found


def _ece(predicted: FloatArray, outcome: FloatArray) -> float | None:
    return ece_of(reliability(predicted, outcome))


def _rates(rating: SurvivalMap, family: Family, *, is_drawn: bool) -> list[float]:
    children = family.children
    confidence = None if children.confidence is None else [children.confidence]
    rates: list[float] = rating.rates(
        [family.depth],
        len(children.tokens),
        share=None if is_drawn else np.array([children.share]),
        confidence=confidence,
    )[0].tolist()
    return rates


def _own_rates(family: Family) -> list[float]:
    """Survival of the children as the draft stated it, over their parent's."""
    above = family.children.above
    return [value / above if above > 0 else 0.0 for value in family.children.survival]
