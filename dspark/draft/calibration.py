"""Survival maps: from what a draft says of a node's children to the chance that each is accepted.

The children of a node are looked at in order: by rank where tokens are compared, by draw index
where they are drawn. With h_r the chance that child r is accepted if verification came to their
parent and the children before it were not,

    h_r   = sigmoid((b_r + w_r z_r + u_r sigmoid(z_r) + g_r c + e_d) / T_d)
    rho_r = h_r (1 - h_0) ... (1 - h_(r-1)), no more than rho_(r-1)

c is the confidence logit of the parent (0 without such a head), d the children's depth, and z_r the
log odds of child r among what the children before it left of the draft's law,

    z_r = log p_r - log(1 - p_0 - ... - p_r),

so sigmoid(z_r) is its share of that. z alone rises without end where the draft is certain, and so
would h; the target is not certain there (docs/log.md, 2026-11-24). The share bends the curve.
The sum of siblings' rho is at most 1 whatever the numbers, no child is rated above one before it,
and how many children are looked at changes none of them. With b = u = e = g = 0 and w = T = 1,
rho is p: the draft's own law, which is what the engine takes where nothing was fitted.

**Rules that draw from laws** (rejection, block): w and u are 0. What a child is worth must be
known before its token is drawn, and z_r is the drawn token's (docs/scheduling.md). The confidence
is the parent's: it follows from tokens drawn above.

Special cases: a draft's confidence c_k for chains is b = w = u = e = 0, g = T = 1; with T_d it is
sequential temperature scaling (DSpark, arXiv 2607.05147, section 3.2.1).

Letters: R ranks, D depths, N nodes whose children are rated, W children of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from dspark.errors import DataError
from dspark.request import Rule
from dspark.tree import FloatArray

__all__ = ["Calibration", "CalibrationKey", "SurvivalMap", "held_logit", "log_odds"]

_LIMIT = 30.0  # logits beyond it are certain
_LEAST = 1e-6  # of a probability whose logarithm is taken
_MOST_ENTRIES = 4096  # ranks and depths of a map, as of a tree


def log_odds(share: FloatArray) -> FloatArray:
    """The log odds z of siblings, from their probabilities.

    Args:
        share: float64 [N, W], probabilities of the children, first child first.

    Returns:
        float64 [N, W], within +-14.
    """
    left = 1 - np.cumsum(share, axis=1)
    odds: FloatArray = np.log(np.maximum(share, _LEAST)) - np.log(np.maximum(left, _LEAST))
    return odds


def _first(values: FloatArray, width: int) -> FloatArray:
    """The values of the first ranks, the last standing for those beyond."""
    size = len(values)
    return values[:width] if width <= size else np.append(values, [values[-1]] * (width - size))


def held_logit(logit: float) -> float:
    """A confidence logit within +-30; 0 for what is no number."""
    return min(max(logit, -_LIMIT), _LIMIT) if logit == logit else 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SurvivalMap:
    """The map of one rule, temperature and shape; the formula is in the module.

    Attributes:
        bias: float64 [R], b by rank; later ranks use the last.
        share: float64 [R], w >= 0; 0 under rules that draw from laws.
        lift: float64 [R], u >= 0, likewise; where none is given, 0 for all.
        confidence: float64 [R], g; the first >= 0.
        depth: float64 [D], e of depth 1, 2, ...; deeper ones use the last.
        temperature: float64 [D], T > 0.
        chances: Mean h by draw index, from which the shape of drawn trees follows; empty where
            nothing is drawn.

    Raises:
        DataError: If lengths differ or a value is out of range.
    """

    bias: FloatArray
    share: FloatArray
    confidence: FloatArray
    depth: FloatArray
    temperature: FloatArray
    lift: FloatArray = field(default_factory=lambda: np.zeros(0))
    chances: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.lift):
            object.__setattr__(self, "lift", np.zeros(len(self.bias)))
        for names in (("bias", "share", "lift", "confidence"), ("depth", "temperature")):
            sizes = {len(getattr(self, name)) for name in names}
            if len(sizes) != 1 or not 1 <= sizes.pop() <= _MOST_ENTRIES:
                raise DataError(f"{' and '.join(names)} of a survival map differ in length.")
        for name in ("bias", "share", "lift", "confidence", "depth", "temperature"):
            if not np.isfinite(getattr(self, name)).all():
                raise DataError(f"{name} of a survival map is not finite.")
        if (self.temperature <= 0).any():
            raise DataError("a temperature of a survival map is not above 0.")
        if (self.share < 0).any() or (self.lift < 0).any() or self.confidence[0] < 0:
            raise DataError("a survival map falls where the draft is surer.")
        if not all(0 < chance < 1 for chance in self.chances):
            raise DataError("chances of a survival map must be between 0 and 1.")

    @property
    def reads_confidence(self) -> bool:
        """False if the parent's confidence makes no difference."""
        return bool(self.confidence.any())

    def step_logits(
        self,
        depth: Sequence[int],
        width: int,
        *,
        share: FloatArray | None = None,
        confidence: Sequence[float] | None = None,
    ) -> FloatArray:
        """Log odds of h; the arguments are those of `rates`."""
        logits = _first(self.bias, width)
        if share is not None:
            odds = log_odds(share)
            logits = logits + _first(self.share, width) * odds
            logits += _first(self.lift, width) / (1 + np.exp(-odds))
        if confidence is not None and self.reads_confidence:
            sure = np.array([held_logit(value) for value in confidence])
            logits = logits + _first(self.confidence, width) * sure[:, None]
        deepest = len(self.depth)
        if depth.count(depth[0]) == len(depth):  # so it is while a tree grows
            level = min(depth[0], deepest) - 1
            logits = (logits + self.depth[level]) / self.temperature[level]
        else:
            levels = np.minimum(np.array(depth), deepest) - 1
            logits = (logits + self.depth[levels, None]) / self.temperature[levels, None]
        held: FloatArray = np.minimum(np.maximum(logits, -_LIMIT), _LIMIT)
        return held if held.ndim == 2 else np.tile(held, (len(depth), 1))

    def rates(
        self,
        depth: Sequence[int],
        width: int,
        *,
        share: FloatArray | None = None,
        confidence: Sequence[float] | None = None,
    ) -> FloatArray:
        """Rho of the children of several nodes.

        Args:
            depth: Depth of the children of each node, from 1, [N].
            width: W >= 1.
            share: float64 [N, W], the draft's probabilities of the children, best first; None for
                drawn children.
            confidence: Confidence logit of each node, [N]; None without such a head.

        Returns:
            float64 [N, W] in (0, 1), falling along a row, rows sum to at most 1.
        """
        logits = self.step_logits(depth, width, share=share, confidence=confidence)
        hazard: FloatArray = 1 / (1 + np.exp(-logits))
        if width == 1:
            return hazard
        left = np.cumprod(1 - hazard[:, :-1], axis=1)
        hazard[:, 1:] *= left
        falling: FloatArray = np.minimum.accumulate(hazard, axis=1)
        return falling

    def to_json(self) -> dict[str, Any]:
        """As JSON values; numbers to nine digits."""
        return {
            item.name: [float(f"{value:.9g}") for value in getattr(self, item.name)]
            for item in fields(self)
        }

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> SurvivalMap:
        """What `to_json` made.

        Raises:
            DataError: If a field is missing or holds anything but numbers.
        """
        names = [item.name for item in fields(SurvivalMap)]
        if "lift" not in row:  # files from before there was one
            names.remove("lift")
        read = {name: _numbers(row, name) for name in names}
        chances = tuple(read.pop("chances"))
        arrays = {name: np.array(values, dtype=np.float64) for name, values in read.items()}
        return SurvivalMap(**arrays, chances=chances)


def _numbers(row: Mapping[str, Any], name: str) -> list[float]:
    values = row.get(name)
    is_list = isinstance(values, list)
    if not is_list or not all(type(v) in (int, float) and math.isfinite(v) for v in values or ()):
        raise DataError(f"{name} of a survival map must be a list of numbers.")
    return [float(value) for value in values or ()]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class CalibrationKey:
    """What a survival map was fitted for.

    Attributes:
        rule: Acceptance rule in force.
        temperature: Of the target's law.
        is_chain: True for paths without branches.
    """

    rule: Rule
    temperature: float
    is_chain: bool

    @property
    def name(self) -> str:
        """What tables call it."""
        shape = "chain" if self.is_chain else "tree"
        return f"{self.rule.value} T={self.temperature:g} {shape}"


class Calibration:
    """The survival maps of one draft.

    Args:
        maps: By what they were fitted for.

    Raises:
        DataError: If a map of a rule that draws from laws reads the draft's probabilities.
    """

    def __init__(self, maps: Mapping[CalibrationKey, SurvivalMap]) -> None:
        for key, found in maps.items():
            if key.rule.draws_from_laws and (found.share.any() or found.lift.any()):
                raise DataError(
                    f"the survival map of rule {key.rule.value!r} reads draft probabilities, but "
                    "must not depend on the token that is drawn."
                )
        self.maps = dict(maps)

    def find(self, rule: Rule, temperature: float, *, is_chain: bool) -> SurvivalMap | None:
        """The map for a request, None where there is none.

        Of the same rule only. A chain takes a chain's map, and where there is none a tree's; a tree
        takes a tree's. Among them the nearest temperature, the lower of two as near.

        Args:
            rule: The rule in force.
            temperature: Of the request.
            is_chain: True if a node gets one child at the most.
        """
        own = [key for key in self.maps if key.rule is rule]
        keys = [key for key in own if key.is_chain == is_chain]
        if not keys and is_chain:
            keys = own
        if not keys:
            return None
        best = min(keys, key=lambda key: (abs(key.temperature - temperature), key.temperature))
        return self.maps[best]
