"""What training minimises, on rows of logits: losses, their gradient, and what they tell.

Per predicted position, with draft law p_d, target law p_t, the text's own token y, the confidence
head's logit z (DSpark, arXiv 2607.05147, equations 9 to 12):

    CE = -log p_d(y)          skipped where the draft's vocabulary lacks y
    L1 = sum over the target's vocabulary of |p_d - p_t|
    c* = 1 - L1 / 2           what the rejection rule accepts; no gradient flows through it
    BCE = -(c* log sigmoid(z) + (1 - c*) log(1 - sigmoid(z)))

Target mass outside the draft's vocabulary counts in full in L1. The gradient with respect to the
logits is written down, not recorded, so that rows of the vocabulary's width are few:

    dCE / dlogits = p_d - [y],    dL1 / dlogits = p_d * (s - <p_d, s>),  s = sign(p_d - p_t)

Letters: R rows, Vd draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.training.recipe import LossSection

__all__ = ["LawRows", "RowLosses", "confidence_rows", "law_rows"]


@dataclass(frozen=True, slots=True, eq=False)
class LawRows:
    """The target's side of some rows.

    Attributes:
        law: [R, Vd], p_t on the draft's vocabulary; not changed.
        outside: [R], mass of p_t elsewhere.
        label: int64 [R], row of y in the draft's vocabulary, -1 where it is not in it.
        best: int64 [R], the target's likeliest token as a row of the draft's vocabulary, -1 where
            it is not in it.
    """

    law: Tensor
    outside: Tensor
    label: Tensor
    best: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RowLosses:
    """What rows of logits cost.

    Attributes:
        ce: [R], 0 where skipped.
        l1: [R].
        acceptance: [R], 1 - L1 / 2.
        agrees: bool [R], the likeliest tokens of draft and target are the same.
        gradient: [R, Vd], of weight * (ce weight * CE + l1 weight * L1) with respect to the logits.
    """

    ce: Tensor
    l1: Tensor
    acceptance: Tensor
    agrees: Tensor
    gradient: Tensor


@torch.no_grad()
def law_rows(logits: Tensor, rows: LawRows, weights: Tensor, loss: LossSection) -> RowLosses:
    """Losses of rows of draft logits, and their gradient.

    Args:
        logits: [R, Vd], float32 or float64; overwritten.
        rows: The target's side.
        weights: [R], factor of each row's gradient.
        loss: Weights of the terms; temperature, which the target's law was taken at too.

    Returns:
        The losses; `gradient` uses the memory of `logits`.
    """
    has_label = (rows.label >= 0).to(logits.dtype)
    label = rows.label.clamp_min(0)[:, None]
    if loss.temperature != 1.0:
        logits = logits.div_(loss.temperature)
    best = logits.argmax(dim=-1, keepdim=True)
    own, top = logits.gather(1, label), logits.gather(1, best)
    law = torch.softmax(logits, dim=-1)
    # The likeliest token has at least 1 / Vd, so the logarithm of its share is exact enough.
    total = top - law.gather(1, best).log()
    ce = (total - own)[:, 0] * has_label
    gap = torch.sub(law, rows.law, out=logits)
    l1 = torch.linalg.vector_norm(gap, 1, dim=-1) + rows.outside
    sign = gap.sign_()
    mean = torch.bmm(law[:, None], sign[:, :, None])[:, 0, 0]
    scale = weights / loss.temperature
    # p_d * (l1 * (s - mean) + ce), then - ce at the label; times the row's factor.
    gradient = sign.mul_((loss.l1 * scale)[:, None])
    gradient.add_((scale * (loss.ce * has_label - loss.l1 * mean))[:, None]).mul_(law)
    gradient.scatter_add_(1, label, (-loss.ce * has_label * scale)[:, None])
    return RowLosses(ce, l1, 1 - l1 / 2, best[:, 0] == rows.best, gradient)


def confidence_rows(logits: Tensor, acceptance: Tensor) -> Tensor:
    """Cross-entropy [R] of confidence logits [R] with the acceptance [R], which is held fixed."""
    return F.binary_cross_entropy_with_logits(
        logits, acceptance.detach().clamp(0, 1).to(logits.dtype), reduction="none"
    )
