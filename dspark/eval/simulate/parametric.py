"""Pools from published acceptance figures: a stated model of proposals and outcomes.

Chains: at position k, given that all before were accepted, the token is accepted with probability
q_k, drawn for every round and position from a Beta law with mean c_k, the conditional acceptance
rate. The drafter knows q: its survival at k is q_1 ... q_k, which is calibrated by construction.
How far the q spread is set by the AUROC of q_k as a predictor of acceptance at k: 0.5 is no spread,
near 1 all q near 0 or 1. Positions and rounds are independent, so the accepted length by k is
1 + c_1 + c_1 c_2 + ... on average; easy and hard texts are not modelled.

Trees: below a node, the first candidate is accepted with q, the m-th one with
(1 - q) h (1 - h)^(m - 2): h is the chance that a candidate is right if all before it are wrong, the
recovery. A tree takes the candidates of highest survival first, best-first.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

import numpy as np

from dspark.errors import ConfigError
from dspark.eval.simulate.pool import NEW, Pool, PoolBuilder
from dspark.tree import FloatArray

__all__ = [
    "PUBLISHED",
    "beta_auroc",
    "chain_pool",
    "concentration",
    "conditional_rates",
    "tree_pool",
]

PUBLISHED: dict[str, tuple[float, ...]] = {
    "v4-pro-thinking": (1.84, 2.51, 3.01, 3.36, 3.61),
    "v4-pro-chat": (1.94, 2.81, 3.58, 4.17, 4.74),
}
"""Accepted length, closing token included, of DSpark with 1, 2, ... 5 drafted tokens.

V4-Pro-0813, thinking on and off. Source: the "golden" accepted lengths of InferenceX, PR 2626.
"""

_GRID = np.linspace(-60.0, 60.0, 6001)  # logit of q
_LOG_Q = -np.logaddexp(0.0, -_GRID)
_LOG_P = -np.logaddexp(0.0, _GRID)  # log(1 - q)
_LEAST, _MOST = 1e-2, 1e6  # concentrations


def conditional_rates(lengths: Sequence[float]) -> tuple[float, ...]:
    """Conditional acceptance by position from accepted lengths by number of drafted tokens.

    Args:
        lengths: Closing token included, with 1, 2, ... drafted tokens.

    Returns:
        c_k = (length_k - length_(k-1)) / (length_(k-1) - length_(k-2)), length_0 = 1.

    Raises:
        ConfigError: If lengths do not rise, or rise faster than acceptance allows.
    """
    rates, before, share = [], 1.0, 1.0
    for length in lengths:
        gained = length - before
        if not 0 < gained <= share + 1e-12:
            raise ConfigError(
                f"accepted lengths {list(lengths)} are not those of a draft: each further token "
                "must add more than 0 and no more than the one before it (the first 1)."
            )
        rates.append(min(1.0, gained / share))
        before, share = length, gained
    return tuple(rates)


def beta_auroc(rate: float, spread: float) -> float:
    """AUROC of q as a predictor of an outcome with probability q, q of a Beta law.

    Args:
        rate: Mean of q, in (0, 1).
        spread: The law's concentration a + b, > 0.
    """
    weight = np.exp(rate * spread * _LOG_Q + (1 - rate) * spread * _LOG_P)
    hits, misses = weight * np.exp(_LOG_Q), weight * np.exp(_LOG_P)
    below = np.cumsum(misses) - misses / 2  # ties count half
    return float((hits * below).sum() / (hits.sum() * misses.sum()))


def concentration(rate: float, auroc: float) -> float:
    """The concentration at which `beta_auroc` is as asked.

    Raises:
        ConfigError: If the AUROC is not in (0.5, 0.99].
    """
    if not 0.5 < auroc <= 0.99:
        raise ConfigError(f"the AUROC is {auroc}, but must be in (0.5, 0.99].")
    low, high = np.log(_LEAST), np.log(_MOST)
    for _ in range(60):  # AUROC falls as the law narrows
        middle = (low + high) / 2
        if beta_auroc(rate, float(np.exp(middle))) > auroc:
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


def check_rates(rates: Sequence[float]) -> None:
    """Refuse what are no conditional acceptance rates.

    Raises:
        ConfigError: If there is none, or one is not in (0, 1].
    """
    bad = next((rate for rate in rates if not 0 < rate <= 1), None)
    if bad is not None or not rates:
        raise ConfigError(
            f"acceptance by position is {list(rates)}, but must be one or more rates in (0, 1]."
        )


def _draws(
    rates: Sequence[float], auroc: float | None, size: int, rng: np.random.Generator
) -> FloatArray:
    """Q of each round and position, float64 [size, positions]."""
    columns = []
    for rate in rates:
        if auroc is None or rate == 1:
            columns.append(np.full(size, rate))
            continue
        spread = concentration(rate, auroc)
        columns.append(rng.beta(rate * spread, (1 - rate) * spread, size))
    return np.stack(columns, axis=1)


def chain_pool(
    rates: Sequence[float],
    *,
    name: str,
    auroc: float | None = None,
    size: int = 1 << 16,
    seed: int = 0,
) -> Pool:
    """A pool of independent chains.

    Args:
        rates: Conditional acceptance at positions 1, 2, ..., in (0, 1].
        name: What to call it.
        auroc: Of the confidence at a position; None for a draft that knows the rates alone.
        size: Rounds.
        seed: Of the draws.

    Raises:
        ConfigError: If a figure is out of range.
    """
    check_rates(rates)
    rng = np.random.default_rng(seed)
    chances = _draws(rates, auroc, size, rng)
    hits = np.cumprod(rng.random(chances.shape) < chances, axis=1)
    gain = np.zeros((size, len(rates) + 1), dtype=np.int64)
    np.cumsum(hits, axis=1, out=gain[:, 1:])
    return Pool(
        name=name,
        survival=np.asarray(np.cumprod(chances, axis=1), dtype=np.float64),
        gain=gain,
        following=np.full(gain.shape, NEW, dtype=np.int64),
        starts=np.arange(size, dtype=np.int64),
    )


def tree_pool(
    rates: Sequence[float],
    *,
    name: str,
    recovery: float,
    budget: int,
    width: int = 4,
    auroc: float | None = None,
    size: int = 4096,
    seed: int = 0,
) -> Pool:
    """A pool of independent best-first trees.

    Args:
        rates: Conditional acceptance of first candidates at depths 1, 2, ...
        name: What to call it.
        recovery: h, the chance of a further candidate if all before it are wrong, in [0, 1).
        budget: Nodes of a tree, >= 1.
        width: Candidates of a node, >= 1.
        auroc: As for `chain_pool`.
        size: Rounds.
        seed: Of the draws.

    Raises:
        ConfigError: If a figure is out of range.
    """
    check_rates(rates)
    if not 0 <= recovery < 1 or budget < 1 or width < 1:
        raise ConfigError(
            f"a tree of {budget} nodes with {width} candidates and recovery {recovery} cannot be: "
            "recovery must be in [0, 1), the others >= 1."
        )
    rng = np.random.default_rng(seed)
    law = _draws(rates, auroc, 1 << 14, rng)
    shares = np.asarray(recovery * (1 - recovery) ** np.arange(width - 1), dtype=np.float64)
    builder = PoolBuilder()
    for _ in range(size):
        survival, gain = _grow(law, shares, budget, rng)
        state = builder.add_state(survival, gain, [NEW] * len(gain))
        builder.add_start(state, prompt=0, output=0)
    if width > 1:
        builder.branched()
    made = builder.build(name)
    return Pool(
        name=name,
        survival=made.survival,
        gain=made.gain,
        following=made.following,
        starts=made.starts,
        is_chain=made.is_chain,
    )


def _grow(
    law: FloatArray, shares: FloatArray, budget: int, rng: np.random.Generator
) -> tuple[list[float], list[int]]:
    """A tree in falling survival, and the tokens accepted with the first 0, 1, ... nodes."""
    tie = itertools.count()
    heap: list[tuple[float, int, int, bool]] = []  # -survival, order, depth, is on the path

    def expand(value: float, depth: int, *, is_reached: bool) -> None:
        if depth == law.shape[1]:
            return
        chance = float(law[int(rng.integers(len(law))), depth])
        chances = [chance, *((1 - chance) * shares)]
        at = int(np.searchsorted(np.cumsum(chances), rng.random(), side="right"))
        for rank, own in enumerate(chances):
            if own > 0:
                entry = (-value * float(own), next(tie), depth + 1, is_reached and rank == at)
                heapq.heappush(heap, entry)

    expand(1.0, 0, is_reached=True)
    survival: list[float] = []
    gain = [0]
    while heap and len(survival) < budget:
        value, _, depth, is_hit = heapq.heappop(heap)
        survival.append(-value)
        gain.append(gain[-1] + is_hit)
        expand(-value, depth, is_reached=is_hit)
    return survival, gain
