"""Fitting survival maps: penalised logistic regression, then sequential temperature scaling.

**Step chances.** Child r of a reached node whose children before it were not accepted either was
accepted or was not: one logistic regression over all such children, with the terms of
`dspark.draft.calibration` (bias, log odds and confidence by rank, an offset by depth). Siblings'
outcomes exclude each other, and this order of looking at them is what makes them separate trials.
Parameters have normal priors around what the engine takes without a fit, so that a rank or depth
seldom seen stays near it:

    where tokens are compared   b 0, w 1 (the draft's own law), u 0, g 0
    where tokens are drawn      b log odds of .6 / (1 + r / 2), g 0; with a confidence head the
                                first child has b 0, g 1 (the head's own claim)
    standard deviations         b 2, w .5, u 2, g .5, e .5

w, u and the first child's g are held to >= 0, so that a child is never worth less where the draft
is surer of it.

**Temperatures of chains.** For position 1, 2, ..., given the scaled steps before it, T_k is chosen
on a grid so that the product of the steps is calibrated against the accepted prefix: the least ECE,
and of temperatures that come as near to it as chance allows (a fifth of `ece_floor`, at least .001)
the one nearest to 1, since ECE over bins is jagged.

**Source:** DSpark, arXiv 2607.05147, section 3.2.1 (sequential temperature scaling); Platt 1999.

Letters: N rows, P parameters, D depths, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dspark.draft.calibration import SurvivalMap, held_logit, log_odds
from dspark.eval.calibrate_record import Family, FirstPaths, Observations
from dspark.eval.confidence import BINS, ece_of, reliability
from dspark.tree import FloatArray, IntArray

__all__ = [
    "ece_floor",
    "fit_logistic",
    "fit_map",
    "fit_temperatures",
    "path_logits",
    "scaled_survival",
]

_BIAS_SPREAD = 2.0
_SLOPE_SPREAD = 0.5
_LIFT_SPREAD = 2.0
_GRID = np.logspace(-1, 1, 81)
_TOLERANCE = 1e-3  # ECE that is given up for a temperature nearer to 1, and
_CHANCE = 0.2  # as a share of what the ECE of a perfect estimate would be
_STEPS = 60
_PSEUDO = 2.0  # prior observations of each draw's mean chance


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trials:
    """Children that were looked at, one row each.

    Attributes:
        rank: Which child of its parent, int64 [N].
        depth: From 1, int64 [N].
        odds: Log odds z, float64 [N]; 0 for drawn children.
        confidence: Logit of the parent's confidence, float64 [N]; 0 without a head.
        hit: 1 if it was accepted, float64 [N].
    """

    rank: IntArray
    depth: IntArray
    odds: FloatArray
    confidence: FloatArray
    hit: FloatArray


def fit_map(seen: Observations, *, is_drawn: bool, is_chain: bool) -> SurvivalMap:
    """Fit the map of one rule, temperature and shape.

    Args:
        seen: What was observed, at least one reached family.
        is_drawn: True for rules that draw from laws.
        is_chain: True for chains, which get temperatures.

    Returns:
        The map.
    """
    trials = _trials(seen.families)
    depths = max(family.depth for family in seen.families)  # offered, though never reached perhaps
    found = _fit_steps(trials, depths, is_drawn=is_drawn, has_confidence=seen.has_confidence)
    if is_chain:
        logits = path_logits(found, seen.paths)
        return replace(found, temperature=fit_temperatures(logits, seen.paths.accepted))
    if not is_drawn:
        return found
    count = np.bincount(trials.rank)
    hits = np.bincount(trials.rank, weights=trials.hit)
    prior = 0.6 / (1 + np.arange(len(count)) / 2)
    chances = (hits + _PSEUDO * prior) / (count + _PSEUDO)
    return replace(found, chances=tuple(chances.tolist()))


def path_logits(rating: SurvivalMap, paths: FirstPaths) -> FloatArray:
    """Log odds of every step of the first children's paths.

    Args:
        rating: A map.
        paths: [N, D].

    Returns:
        float64 [N, D], NaN where there is no step.
    """
    logits = np.full_like(paths.accepted, np.nan)
    for column in range(paths.accepted.shape[1]):
        rows = np.flatnonzero(~np.isnan(paths.accepted[:, column]))
        share = paths.share[rows, column, None]
        confidence = paths.confidence[rows, column]
        logits[rows, column] = rating.step_logits(
            [column + 1] * len(rows),
            1,
            share=None if np.isnan(share).all() else share,
            confidence=None if np.isnan(confidence).all() else confidence.tolist(),
        )[:, 0]
    return logits


def scaled_survival(logits: FloatArray, temperatures: Sequence[float] | FloatArray) -> FloatArray:
    """Product of the steps down to each position.

    Args:
        logits: Log odds of the steps, [N, D], NaN behind the end.
        temperatures: T of positions 1 .. D.

    Returns:
        float64 [N, D], NaN where the logits are.
    """
    steps = 1 / (1 + np.exp(-np.clip(logits / np.asarray(temperatures), -30, 30)))
    survival: FloatArray = np.cumprod(steps, axis=1)
    return survival


def fit_temperatures(logits: FloatArray, accepted: FloatArray) -> FloatArray:
    """Sequential temperature scaling; see the module.

    Args:
        logits: Log odds of the steps, [N, D], NaN behind the end.
        accepted: 1 where the path down to there was accepted, [N, D].

    Returns:
        float64 [D], in [.1, 10]; 1 where nothing was observed.

    **Source:** DSpark, arXiv 2607.05147, section 3.2.1.
    """
    depth = logits.shape[1]
    found = np.ones(depth)
    above = np.ones(len(logits))
    distance = np.abs(np.log(_GRID))
    for column in range(depth):
        rows = np.flatnonzero(~np.isnan(logits[:, column]) & ~np.isnan(accepted[:, column]))
        if len(rows):
            step, outcome = logits[rows, column], accepted[rows, column]
            errors = np.array([_error(above[rows], step / t, outcome) for t in _GRID])
            chance = ece_floor(_scaled(above[rows], step)) or 0.0
            limit = errors.min() + max(_TOLERANCE, _CHANCE * chance)
            good = np.flatnonzero(errors <= limit)
            found[column] = _GRID[good[distance[good].argmin()]]
        above = _scaled(above, logits[:, column] / found[column])
    return found


def ece_floor(predicted: FloatArray, *, bins: int = BINS) -> float | None:
    """Mean ECE of these predictions if every one of them were exactly right.

    Samples count as independent; rounds of one text are not quite, so the truth is a little higher.

    Args:
        predicted: float64 [N] in [0, 1].
        bins: Bins of equal width.

    Returns:
        The sum over bins of sqrt(2 / pi * sum of p (1 - p)) / N; None without a prediction.
    """
    if not len(predicted):
        return None
    index = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    variance = np.bincount(index, weights=predicted * (1 - predicted))
    return float(np.sqrt(2 / np.pi * variance).sum() / len(predicted))


def _error(above: FloatArray, logits: FloatArray, outcome: FloatArray) -> float:
    return ece_of(reliability(_scaled(above, logits), outcome)) or 0.0


def _scaled(above: FloatArray, logits: FloatArray) -> FloatArray:
    """Survival of the next position from the one above and the log odds of the step."""
    below: FloatArray = above / (1 + np.exp(-np.clip(logits, -30, 30)))
    return below


def _trials(families: Sequence[Family]) -> _Trials:
    """The children of reached nodes down to the accepted one."""
    rank: list[int] = []
    depth: list[int] = []
    odds: list[float] = []
    confidence: list[float] = []
    hit: list[bool] = []
    for family in families:
        children = family.children
        if not family.is_reached or not children.tokens:
            continue
        looked_at = len(children.tokens) if family.hit < 0 else family.hit + 1
        own = log_odds(np.array([children.share]))[0] if children.share else None
        for place in range(looked_at):
            rank.append(place)
            depth.append(family.depth)
            odds.append(0.0 if own is None else float(own[place]))
            sure = children.confidence
            confidence.append(0.0 if sure is None else held_logit(sure))
            hit.append(place == family.hit)
    return _Trials(
        rank=np.array(rank, dtype=np.int64),
        depth=np.array(depth, dtype=np.int64),
        odds=np.array(odds),
        confidence=np.array(confidence),
        hit=np.array(hit, dtype=np.float64),
    )


def _fit_steps(
    trials: _Trials, depths: int, *, is_drawn: bool, has_confidence: bool
) -> SurvivalMap:
    ranks = int(trials.rank.max()) + 1
    by_rank = np.eye(ranks)[trials.rank]
    odds, own = trials.odds[:, None], 1 / (1 + np.exp(-trials.odds[:, None]))
    blocks = [by_rank, by_rank * odds, by_rank * own, by_rank * trials.confidence[:, None]]
    rows = np.concatenate([*blocks, np.eye(depths)[trials.depth - 1]], axis=1)
    bias, share, sure = np.zeros(ranks), np.full(ranks, 1.0 - is_drawn), np.zeros(ranks)
    if is_drawn:
        prior = 0.6 / (1 + np.arange(ranks) / 2)
        bias = np.log(prior / (1 - prior))
        if has_confidence:
            bias[0], sure[0] = 0.0, 1.0
    sizes = [ranks] * 4 + [depths]
    center = np.concatenate([bias, share, np.zeros(ranks), sure, np.zeros(depths)])
    spread = np.repeat(
        [_BIAS_SPREAD, _SLOPE_SPREAD, _LIFT_SPREAD, _SLOPE_SPREAD, _SLOPE_SPREAD], sizes
    )
    is_free = np.repeat([True, not is_drawn, not is_drawn, has_confidence, True], sizes)
    is_rising = np.repeat([False, True, True, False, False], sizes)
    is_rising[3 * ranks] = True  # the first child's confidence
    found = np.where(is_free, 0.0, center)
    found[is_free] = fit_logistic(
        rows[:, is_free], trials.hit, center[is_free], spread[is_free], is_rising[is_free]
    )
    bias, share, lift, sure, offset = np.split(found, ranks * np.arange(1, 5))
    return SurvivalMap(
        bias=bias,
        share=share,
        lift=lift,
        confidence=sure,
        depth=offset,
        temperature=np.ones(depths),
    )


def fit_logistic(
    rows: FloatArray,
    hit: FloatArray,
    center: FloatArray,
    spread: FloatArray,
    is_rising: NDArray[np.bool_],
) -> FloatArray:
    """Logistic regression with normal priors.

    Args:
        rows: [N, P].
        hit: [N], 0 or 1.
        center: Means of the priors, [P].
        spread: Their standard deviations, [P], > 0.
        is_rising: Which parameters must be >= 0, [P].

    Returns:
        The most probable parameters, [P].
    """
    found = center.copy()
    is_free = np.ones(len(center), dtype=np.bool_)
    while True:
        fixed = rows[:, ~is_free] @ found[~is_free]
        found[is_free] = _newton(rows[:, is_free], hit, fixed, center[is_free], spread[is_free])
        wrong = is_free & is_rising & (found < 0)
        if not wrong.any():
            return found
        found[wrong] = 0.0
        is_free &= ~wrong


def _newton(
    rows: FloatArray, hit: FloatArray, fixed: FloatArray, center: FloatArray, spread: FloatArray
) -> FloatArray:
    """Newton's method with halved steps; the objective is strictly convex."""
    weight = 1 / spread**2

    def objective(at: FloatArray) -> float:
        logits = fixed + rows @ at
        loss = np.logaddexp(0, logits) - hit * logits
        return float(loss.sum() + 0.5 * (weight * (at - center) ** 2).sum())

    found, value = center.copy(), objective(center)
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(-np.clip(fixed + rows @ found, -500, 500)))
        slope = rows.T @ (chance - hit) + weight * (found - center)
        bend = (rows * (chance * (1 - chance))[:, None]).T @ rows + np.diag(weight)
        step = np.linalg.solve(bend, slope)
        scale = 1.0
        while (better := objective(found - scale * step)) > value and scale > 1e-8:
            scale /= 2
        if better > value:
            break
        found, gain, value = found - scale * step, value - better, better
        if gain < 1e-10 * max(1.0, value):
            break
    return found
