"""What training minimises, on rows of logits: losses, their gradient, and what they tell.

Per predicted position, with draft law p_d, target law p_t, the text's own token y, the confidence
head's logit z (DSpark, arXiv 2607.05147, equations 9 to 12):

    CE = -log p_d(y)          skipped where the draft's vocabulary lacks y
       = -sum over the draft's vocabulary of p~ log p_d, with labels "target": p~ is p_t divided by
         its mass there; skipped where the draft's vocabulary lacks the target's likeliest token
    L1 = sum over the target's vocabulary of |p_d - p_t|
    c* = 1 - L1 / 2           what the rejection rule accepts; no gradient flows through it
    BCE = -(c* log sigmoid(z) + (1 - c*) log(1 - sigmoid(z)))

Target mass outside the draft's vocabulary counts in full in L1. The gradient with respect to the
logits is written down, not recorded, so that rows of the vocabulary's width are few:

    dCE / dlogits = p_d - [y], or p_d - p~
    dL1 / dlogits = p_d * (s - <p_d, s>),  s = sign(p_d - p_t)

**Source:** of the cross-entropy with p~ and of what it skips: SafeAILab/EAGLE's EAGLE-3 trainer.

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
    if loss.temperature != 1.0:
        logits = logits.div_(loss.temperature)
    best = logits.argmax(dim=-1, keepdim=True)
    top = logits.gather(1, best)
    labels = _labels(logits, rows, loss)
    law = torch.softmax(logits, dim=-1)
    # The likeliest token has at least 1 / Vd, so the logarithm of its share is exact enough.
    total = top - law.gather(1, best).log()
    ce = (total[:, 0] - labels.logit) * labels.counts
    gap = torch.sub(law, rows.law, out=logits)
    l1 = torch.linalg.vector_norm(gap, 1, dim=-1) + rows.outside
    sign = gap.sign_()
    mean = torch.bmm(law[:, None], sign[:, :, None])[:, 0, 0]
    scale = weights / loss.temperature
    # p_d * (l1 * (s - mean) + ce), then - ce at the label; times the row's factor.
    gradient = sign.mul_((loss.l1 * scale)[:, None])
    gradient.add_((scale * (loss.ce * labels.counts - loss.l1 * mean))[:, None]).mul_(law)
    factor = -loss.ce * labels.counts * scale
    if labels.token is not None:
        gradient.scatter_add_(1, labels.token, factor[:, None])
    else:
        gradient.addcmul_(rows.law, (factor / labels.mass)[:, None])
    return RowLosses(ce, l1, 1 - l1 / 2, best[:, 0] == rows.best, gradient)


@dataclass(frozen=True, slots=True, eq=False)
class _Labels:
    """What the cross-entropy is taken with.

    Attributes:
        logit: [R], the draft's mean logit under the label.
        counts: [R], 1 where there is a label, else 0.
        token: int64 [R, 1], the label's row in the draft's vocabulary; None if it is a law.
        mass: [R], mass of the target's law within the draft's vocabulary; 1 if it is a token.
    """

    logit: Tensor
    counts: Tensor
    token: Tensor | None
    mass: Tensor


def _labels(logits: Tensor, rows: LawRows, loss: LossSection) -> _Labels:
    if loss.labels == "text":
        token = rows.label.clamp_min(0)[:, None]
        counts = (rows.label >= 0).to(logits.dtype)
        return _Labels(logits.gather(1, token)[:, 0], counts, token, torch.ones_like(counts))
    mass = rows.law.sum(dim=-1).clamp_min(torch.finfo(rows.law.dtype).tiny)
    mean = torch.bmm(rows.law[:, None], logits[:, :, None])[:, 0, 0] / mass
    return _Labels(mean, (rows.best >= 0).to(logits.dtype), None, mass)


def confidence_rows(logits: Tensor, acceptance: Tensor) -> Tensor:
    """Cross-entropy [R] of confidence logits [R] with the acceptance [R], which is held fixed."""
    return F.binary_cross_entropy_with_logits(
        logits, acceptance.detach().clamp(0, 1).to(logits.dtype), reduction="none"
    )
