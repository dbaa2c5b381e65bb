"""Sums over blocks, and the figures that people read off them.

Acceptance at a position is what the rejection rule accepts there, 1 - TV. Agreement is that the
likeliest tokens are the same, which is what the greedy rule asks. The estimates of tau are for
chains, over blocks whose depths are all valid: 1 + the expected length of the accepted prefix, with
agreement (greedy) or acceptance (sampling) multiplied up along each block. Both are taken with the
text's own tokens before each position.

Letters: A blocks, G depths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SUMS", "Figures", "block_sums", "figures_of"]

SUMS = (
    "count",
    "weight",
    "ce",
    "l1",
    "bce",
    "acceptance",
    "agreement",
    "prefix",
    "run",
    "chain_greedy",
    "chain_sampling",
    "full",
)
"""Rows of the matrix of sums [len(SUMS), G]:

count, weight: valid depths and their weights; ce, l1, bce: losses times weight; acceptance,
agreement: sums over valid depths; prefix: valid depths all of whose earlier depths agree; run:
those of them that agree;
chain_greedy, chain_sampling: products along blocks whose depths are all valid; full: such blocks.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a number of blocks showed.

    Attributes:
        loss: Weighted sum of the terms.
        ce: Cross-entropy, weighted over depths.
        l1: Distance of the laws, weighted over depths.
        bce: Cross-entropy of the confidence, weighted over depths.
        acceptance: 1 - TV at depth 1, 2, ...
        agreement: Greedy agreement at depth 1, 2, ...
        conditional: The same, where all earlier depths of the block agree.
        tau_greedy: Estimated accepted length of greedy chains, closing token included.
        tau_sampling: The same for sampling chains under the rejection rule.
        positions: Valid positions counted.
    """

    loss: float
    ce: float
    l1: float
    bce: float
    acceptance: tuple[float, ...]
    agreement: tuple[float, ...]
    conditional: tuple[float, ...]
    tau_greedy: float
    tau_sampling: float
    positions: int


def block_sums(
    weights: Tensor, agrees: Tensor, acceptance: Tensor, losses: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Sums over blocks.

    Args:
        weights: [A, G], 0 where not valid.
        agrees: bool [A, G].
        acceptance: [A, G].
        losses: CE, L1, BCE, each [A, G].

    Returns:
        float64 [len(SUMS), G].
    """
    weights = weights.double()
    is_valid = (weights > 0).double()
    right = agrees.double() * is_valid
    accepted = acceptance.double() * is_valid
    run = right.cumprod(dim=1)
    before = torch.cat([torch.ones_like(run[:, :1]), run[:, :-1]], dim=1)
    is_full = is_valid.amin(dim=1, keepdim=True)
    rows = [
        is_valid,
        weights,
        *(weights * loss.double() for loss in losses),
        accepted,
        right,
        before * is_valid,
        run * is_valid,
        run * is_full,
        accepted.cumprod(dim=1) * is_full,
        is_full.expand_as(run),
    ]
    return torch.stack([row.sum(dim=0) for row in rows])


def figures_of(sums: Tensor, terms: tuple[float, float, float]) -> Figures:
    """Turn sums into figures.

    Args:
        sums: From `block_sums`, added up.
        terms: Weights of CE, L1 and BCE.
    """
    named = dict(zip(SUMS, sums.tolist(), strict=True))
    weight = max(sum(named["weight"]), 1e-30)
    ce, l1, bce = (sum(named[name]) / weight for name in ("ce", "l1", "bce"))

    def over(name: str, base: str) -> tuple[float, ...]:
        pairs = zip(named[name], named[base], strict=True)
        return tuple(value / count if count else 0.0 for value, count in pairs)

    return Figures(
        loss=terms[0] * ce + terms[1] * l1 + terms[2] * bce,
        ce=ce,
        l1=l1,
        bce=bce,
        acceptance=over("acceptance", "count"),
        agreement=over("agreement", "count"),
        conditional=over("run", "prefix"),
        tau_greedy=1 + sum(over("chain_greedy", "full")),
        tau_sampling=1 + sum(over("chain_sampling", "full")),
        positions=round(sum(named["count"])),
    )
