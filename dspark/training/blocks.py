"""Training DSpark and DFlash: a block of slots at every anchor, all in one forward.

Letters: A anchors, S slots, G depths, D hidden size, Vd draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark.draft.dspark_module import DSparkModule
from dspark.target import SharesHeadRows
from dspark.training.attention import make_attend
from dspark.training.network import DraftTraining
from dspark.training.packing import Packed
from dspark.training.recipe import LossSection

__all__ = ["BlockTraining"]


class BlockTraining(DraftTraining):
    """A DSpark or DFlash module that is trained.

    Args:
        module: The module, with the target's head rows taken where it shares them.
        teacher: The target, whose output head gives the laws.
        loss: What is minimised.
    """

    def __init__(self, module: DSparkModule, teacher: SharesHeadRows, loss: LossSection) -> None:
        ids, shared = module.vocab.ids, module.head_rows
        super().__init__(
            vocab_size=module.config.vocab_size,
            ids=ids,
            teacher=teacher.head_rows(ids) if shared is None else shared,
            loss=loss,
        )
        self.module = module
        if module.markov_head is not None:
            # Its gradient, once a part, would be a whole matrix; added up it is one anyway.
            module.markov_head.markov_w1.sparse = True

    def hidden(self, packed: Packed) -> Tensor:
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

    def logits(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Base logits and the sequential head's; see `DraftTraining.logits`."""
        module, first = self.module, self.module.config.first_slot
        logits = module.base_logits(hidden[:, first:])
        if module.markov_head is not None:
            logits += module.markov_head.unroll(previous, hidden)[:, first:].float()
        return logits

    def confidence(self, hidden: Tensor, previous: Tensor) -> Tensor | None:
        """Confidence logits; see `DraftTraining.confidence`."""
        first = self.module.config.first_slot
        return self.module.confidence(
            hidden[:, first:].flatten(0, 1), previous[:, first:].flatten()
        )

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of all heads."""
        module = self.module
        heads = [module.markov_head, module.confidence_head, getattr(module, "lm_head", None)]
        return [p for head in heads if head is not None for p in head.parameters()]
