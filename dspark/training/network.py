"""A draft with its loss: packed sequences in, a scalar out, nothing in between kept long.

Rows of the vocabulary's width are made, used and dropped part by part. The gradient with respect to
the draft's output and the heads' parameters is found on the way, in the forward pass; the backward
pass only multiplies it. What a kind of draft computes at its anchors is a subclass: blocks.py,
unrolled.py.

Letters: A anchors, S slots, G depths, D hidden size, R rows of a part, Vd draft vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.target import HeadRows
from dspark.training.metrics import SUMS, block_sums
from dspark.training.objective import LawRows, confidence_rows, law_rows
from dspark.training.packing import Packed
from dspark.training.recipe import LossSection

__all__ = ["DraftTraining", "head_logits"]

_PART_BYTES = 28 << 20  # of a part's logits: the allocator hands back larger blocks every time


class DraftTraining(nn.Module, ABC):
    """A draft that is trained.

    Args:
        vocab_size: V.
        ids: int64 [Vd], tokens of a reduced vocabulary, None for the target's.
        teacher: Rows of the target's head for the draft's vocabulary, which give the laws.
        loss: What is minimised.
    """

    def __init__(
        self, *, vocab_size: int, ids: Tensor | None, teacher: HeadRows, loss: LossSection
    ) -> None:
        super().__init__()
        self.loss = loss
        self._teacher = teacher
        self.register_buffer("place", torch.arange(vocab_size), persistent=False)
        if ids is not None:
            self.place = torch.full((vocab_size,), -1, device=ids.device)
            self.place[ids] = torch.arange(len(ids), device=ids.device)

    place: Tensor
    """int64 [V], row of every token in the draft's vocabulary, -1 where it is not in it."""

    @abstractmethod
    def hidden(self, packed: Packed) -> Tensor:
        """The draft's output at all slots, [A, S, D]."""

    @abstractmethod
    def logits(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Draft logits, float32 [A, G, Vd] (float64 in float64), of some anchors.

        Args:
            hidden: [A, S, D].
            previous: int64 [A, S].
        """

    @abstractmethod
    def confidence(self, hidden: Tensor, previous: Tensor) -> Tensor | None:
        """Confidence logits [A * G] of some anchors; None without a confidence head."""

    @abstractmethod
    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters that `logits` and `confidence` use."""

    def forward(self, packed: Packed, scale: float) -> tuple[Tensor, Tensor]:
        """Loss of a forward.

        Args:
            packed: What to run.
            scale: Factor of the weighted sum of the losses: 1 over the step's total weight.

        Returns:
            (loss, float64 [len(SUMS), G] for figures).
        """
        hidden = self.hidden(packed)
        sums = torch.zeros(len(SUMS), packed.labels.shape[1], dtype=torch.float64)
        heads: Any = _Heads
        loss: Tensor = heads.apply(self, packed, scale, sums, hidden, *self.head_parameters())
        return loss, sums

    @torch.no_grad()
    def laws(self, packed: Packed, blocks: slice) -> LawRows:
        """The target's side of some blocks' rows."""
        wanted, back = packed.teacher[blocks].flatten().unique(return_inverse=True)
        logits = head_logits(packed.final[wanted], self._teacher)
        temperature = self.loss.temperature
        if temperature != 1.0:
            logits = logits.div_(temperature)
        law = logits.sub_(packed.total[wanted, None]).exp_()
        outside = (1 - law.sum(dim=-1)).clamp_min(0)
        best = self.place[packed.best[wanted]]
        label = self.place[packed.labels[blocks].flatten()]
        return LawRows(law[back], outside[back], label, best[back])

    def part_size(self, depths: int) -> int:
        """Blocks of a part, each of so many depths."""
        return max(1, _PART_BYTES // (4 * self._teacher.weight.shape[0] * depths))


def _wide(rows: Tensor) -> Tensor:
    """Rows in float32, or float64 where they are."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def head_logits(rows: Tensor, head: HeadRows) -> Tensor:
    """Logits, float32 [R, n] (float64 in float64), of what a head gets [R, D]; differentiable."""
    logits = _wide(F.linear(rows.to(head.weight.dtype), head.weight, head.bias))
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


class _Heads(torch.autograd.Function):
    """Loss of the heads on the draft's output, with the gradient found in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        network: DraftTraining,
        packed: Packed,
        scale: float,
        sums: Tensor,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        needs = bool(ctx.needs_input_grad[4])
        grads = [torch.zeros_like(parameter) for parameter in parameters] if needs else []
        parts = []
        total = 0.0
        size = network.part_size(packed.labels.shape[1])
        for start in range(0, packed.num_anchors, size):
            blocks = slice(start, start + size)
            part = hidden[blocks].detach().requires_grad_(needs)
            roots, gradients, figures = _run_part(network, packed, blocks, part, scale)
            sums += figures
            total += _loss_of(figures, network.loss) * scale
            if not needs:
                continue
            found = torch.autograd.grad(
                roots, [part, *parameters], grad_outputs=gradients, allow_unused=True
            )
            parts.append(found[0])
            for own, more in zip(grads, found[1:], strict=True):
                if more is not None:
                    own += more
        if needs:
            ctx.save_for_backward(torch.cat(parts), *grads)
        kept = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.new_tensor(total, dtype=kept)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Any, ...]:
        factor = float(outputs[0])
        found = [tensor if factor == 1.0 else tensor * factor for tensor in ctx.saved_tensors]
        return (None, None, None, None, *found)


def _run_part(
    network: DraftTraining, packed: Packed, blocks: slice, hidden: Tensor, scale: float
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Losses of some blocks: tensors to go back from, their gradients, sums for figures."""
    loss = network.loss
    weights = packed.weights[blocks]
    with torch.enable_grad():
        previous = packed.previous[blocks]
        logits = network.logits(hidden, previous)
        confidence = network.confidence(hidden, previous)
    rows = law_rows(
        logits.detach().flatten(0, 1),
        network.laws(packed, blocks),
        weights.flatten() * scale,
        loss,
    )
    roots: list[Tensor] = [logits]
    gradients = [rows.gradient.view_as(logits)]
    bce = torch.zeros_like(rows.ce)
    if confidence is not None:
        with torch.enable_grad():
            bce = confidence_rows(confidence, rows.acceptance)
        roots.append(bce)
        gradients.append(weights.flatten() * (scale * loss.confidence))
    shape = weights.shape
    losses = (rows.ce.view(shape), rows.l1.view(shape), bce.detach().view(shape))
    sums = block_sums(weights, rows.agrees.view(shape), rows.acceptance.view(shape), losses)
    return roots, gradients, sums.cpu()


def _loss_of(sums: Tensor, loss: LossSection) -> float:
    ce, l1, bce = (float(sums[SUMS.index(name)].sum()) for name in ("ce", "l1", "bce"))
    return loss.ce * ce + loss.l1 * l1 + loss.confidence * bce
