"""A draft module with its loss: packed sequences in, a scalar out, nothing in between kept long.

Rows of the vocabulary's width are made, used and dropped part by part. The gradient with respect to
the backbone's output and the heads' parameters is found on the way, in the forward pass; the
backward pass only multiplies it.

Letters: A anchors, S slots, G depths, D hidden size, R rows of a part, Vd draft vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.draft.dspark_module import DSparkModule
from dspark.target import HeadRows, SharesHeadRows
from dspark.training.attention import make_attend
from dspark.training.metrics import SUMS, block_sums
from dspark.training.objective import LawRows, confidence_rows, law_rows
from dspark.training.packing import Packed
from dspark.training.recipe import LossSection

__all__ = ["DraftTraining"]

_PART_BYTES = 28 << 20  # of a part's logits: the allocator hands back larger blocks every time


class DraftTraining(nn.Module):
    """A DSpark or DFlash module that is trained.

    Args:
        module: The module, with the target's head rows taken where it shares them.
        teacher: The target, whose output head gives the laws.
        loss: What is minimised.
    """

    def __init__(self, module: DSparkModule, teacher: SharesHeadRows, loss: LossSection) -> None:
        super().__init__()
        self.module = module
        self.loss = loss
        ids = module.vocab.ids
        shared = module.head_rows
        if module.markov_head is not None:
            # Its gradient, once a part, would be a whole matrix; added up it is one anyway.
            module.markov_head.markov_w1.sparse = True
        self._teacher = shared if shared is not None else teacher.head_rows(ids)
        size = module.config.vocab_size
        self.register_buffer("place", torch.arange(size), persistent=False)
        if ids is not None:
            self.place = torch.full((size,), -1, device=ids.device)
            self.place[ids] = torch.arange(len(ids), device=ids.device)

    place: Tensor
    """int64 [V], row of every token in the draft's vocabulary, -1 where it is not in it."""

    def forward(self, packed: Packed, scale: float) -> tuple[Tensor, Tensor]:
        """Loss of a forward.

        Args:
            packed: What to run.
            scale: Factor of the weighted sum of the losses: 1 over the step's total weight.

        Returns:
            (loss, float64 [len(SUMS), G] for figures).
        """
        hidden = self._hidden(packed)
        parameters = self._head_parameters()
        sums = torch.zeros(len(SUMS), packed.labels.shape[1], dtype=torch.float64)
        heads: Any = _Heads
        loss: Tensor = heads.apply(self, packed, scale, sums, hidden, *parameters)
        return loss, sums

    def _hidden(self, packed: Packed) -> Tensor:
        """Backbone's output of all slots, [A, S, D]."""
        module = self.module
        c = module.combine(packed.features)
        context = module.context(c, packed.context_positions)
        slots = module.config.block_size
        offsets = torch.arange(slots, device=packed.anchors.device)
        positions = (packed.anchors[:, None] + offsets).flatten()
        attend = make_attend(packed, context, module.windows, slots)
        rows = module.embed(packed.block_tokens.flatten())
        return module.block(rows, positions, attend).view(-1, slots, rows.shape[-1])

    def _head_parameters(self) -> list[nn.Parameter]:
        module = self.module
        heads = [module.markov_head, module.confidence_head, getattr(module, "lm_head", None)]
        return [p for head in heads if head is not None for p in head.parameters()]

    def logits(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Draft logits float32 [A, G, Vd] of blocks.

        Args:
            hidden: [A, S, D].
            previous: int64 [A, S].
        """
        module, first = self.module, self.module.config.first_slot
        logits = module.base_logits(hidden[:, first:])
        if module.markov_head is not None:
            logits += module.markov_head.unroll(previous, hidden)[:, first:].float()
        return logits

    @torch.no_grad()
    def laws(self, packed: Packed, blocks: slice) -> LawRows:
        """The target's side of some blocks' rows."""
        wanted, back = packed.teacher[blocks].flatten().unique(return_inverse=True)
        logits = _head_logits(packed.final[wanted], self._teacher)
        temperature = self.loss.temperature
        if temperature != 1.0:
            logits = logits.div_(temperature)
        law = logits.sub_(packed.total[wanted, None]).exp_()
        outside = (1 - law.sum(dim=-1)).clamp_min(0)
        best = self.place[packed.best[wanted]]
        label = self.place[packed.labels[blocks].flatten()]
        return LawRows(law[back], outside[back], label, best[back])

    def part_size(self) -> int:
        """Blocks of a part."""
        config = self.module.config
        return max(1, _PART_BYTES // (4 * config.draft_vocab_size * config.gamma))


def _head_logits(rows: Tensor, head: HeadRows) -> Tensor:
    bias = None if head.bias is None else head.bias
    logits = F.linear(rows.to(head.weight.dtype), head.weight, bias).float()
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


class _Heads(torch.autograd.Function):
    """Loss of the heads on the backbone's output, with the gradient found in the forward pass."""

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
        for start in range(0, packed.num_anchors, network.part_size()):
            blocks = slice(start, start + network.part_size())
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
        return hidden.new_tensor(total, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Any, ...]:
        factor = float(outputs[0])
        found = [tensor if factor == 1.0 else tensor * factor for tensor in ctx.saved_tensors]
        return (None, None, None, None, *found)


def _run_part(
    network: DraftTraining, packed: Packed, blocks: slice, hidden: Tensor, scale: float
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Losses of some blocks: tensors to go back from, their gradients, sums for figures."""
    loss, first = network.loss, network.module.config.first_slot
    weights = packed.weights[blocks]
    with torch.enable_grad():
        previous = packed.previous[blocks]
        logits = network.logits(hidden, previous)
        confidence = network.module.confidence(
            hidden[:, first:].flatten(0, 1), previous[:, first:].flatten()
        )
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
