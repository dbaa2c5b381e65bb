"""The loss of a draft's laws against the frozen target's, a few rows of the vocabulary at a time.

The laws of both are made, compared and dropped part by part; the gradient with respect to the
draft's hidden states and Markov rows is found on the way. What is minimised and how the gradient is
written down: `dspark.training.objective`. Letters: R rows, D hidden, K Markov rank, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark.training.objective import LawRows, law_rows
from dspark.training.recipe import LossSection

__all__ = ["DraftRows", "depth_weights", "draft_loss"]

_ROWS = 512  # of the vocabulary's width at a time


@dataclass(frozen=True, slots=True, eq=False)
class DraftRows:
    """What rows are compared with.

    Attributes:
        head: [V, D], the target's, which the draft shares.
        teacher: [R, D], what the target's head gets at the rows' positions.
        labels: int64 [R], the text's own tokens.
        weights: [R], factor of each row.
        loss: Weights of the terms.
    """

    head: Tensor
    teacher: Tensor
    labels: Tensor
    weights: Tensor
    loss: LossSection


class _DraftLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, latent: Tensor, w2: Tensor, rows: DraftRows
    ) -> tuple[Tensor, Tensor]:
        d_hidden, d_latent = torch.empty_like(hidden), torch.empty_like(latent)
        d_w2 = torch.zeros_like(w2)
        total, acceptance = hidden.new_zeros(()), hidden.new_empty(len(hidden))
        for a in range(0, len(hidden), _ROWS):
            part = slice(a, a + _ROWS)
            teacher = torch.mm(rows.teacher[part], rows.head.T)
            law = teacher.softmax(-1)
            compared = LawRows(
                law=law,
                outside=law.new_zeros(len(law)),
                label=rows.labels[part],
                best=teacher.argmax(-1),
            )
            logits = torch.mm(hidden[part], rows.head.T)
            if latent.shape[1]:
                logits.addmm_(latent[part], w2.T)
            weights = rows.weights[part]
            found = law_rows(logits, compared, weights, rows.loss)
            total += (weights * (rows.loss.ce * found.ce + rows.loss.l1 * found.l1)).sum()
            acceptance[part] = found.acceptance
            torch.mm(found.gradient, rows.head, out=d_hidden[part])
            torch.mm(found.gradient, w2, out=d_latent[part])
            d_w2.addmm_(found.gradient.T, latent[part])
        ctx.save_for_backward(d_hidden, d_latent, d_w2)
        ctx.mark_non_differentiable(acceptance)
        return total, acceptance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        d_hidden, d_latent, d_w2 = ctx.saved_tensors
        return d_hidden * grad, d_latent * grad, d_w2 * grad, None


def draft_loss(
    hidden: Tensor, latent: Tensor, w2: Tensor, rows: DraftRows
) -> tuple[Tensor, Tensor]:
    """Weighted loss of a draft's laws softmax(head hidden + w2 latent).

    Args:
        hidden: [R, D], normed.
        latent: [R, K]; K is 0 without a Markov head.
        w2: [V, K].
        rows: What to compare with.

    Returns:
        Sum over rows of weight * (ce * CE + l1 * L1), and each row's acceptance [R], 1 - L1 / 2,
        through which no gradient flows.
    """
    out: tuple[Tensor, Tensor] = _DraftLoss.apply(hidden, latent, w2, rows)  # type: ignore[no-untyped-call]
    return out


def depth_weights(count: int, decay: float) -> Tensor:
    """exp(-(k - 1) / decay) for k = 1 .. count, which sum to 1."""
    weights = torch.tensor([math.exp(-k / decay) for k in range(count)])
    return weights / weights.sum()
