"""Training EAGLE-3 and MTP: at every anchor the draft is run on by itself, step after step.

Training-time test (EAGLE-3, arXiv 2503.01840, section 3.2). Row t pairs the feature of position t
with the token at t + 1; K/V of all rows before an anchor s come from the target's hidden states.
Step 1 is row s - 1 and predicts token s + 1. Step k stands at position s + k - 2, takes the text's
token s + k - 1 and what step k - 1 gave in place of the feature, sees the rows up to s - 1 and the
anchor's own steps since, and predicts token s + k: what a drafter computes that has committed s + 1
tokens and drafted k - 1. With one layer, rows that are nobody's step 1 need K/V and no more.

Letters: A anchors, C context rows, D hidden size, E target's hidden size, J key/value heads, e head
size, G steps, Vd draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark.draft.eagle3_module import Attend, Eagle3Module
from dspark.target import HeadRows, SharesHeadRows
from dspark.training.attention import make_step_attend
from dspark.training.network import DraftTraining, head_logits
from dspark.training.packing import Packed
from dspark.training.recipe import LossSection

__all__ = ["UnrolledTraining"]


class UnrolledTraining(DraftTraining):
    """An EAGLE-3 or MTP module that is trained.

    Args:
        module: The module.
        rows: Rows of the target's head that it predicts with; None if it has its own.
        teacher: The target, for the embedding and the laws.
        loss: What is minimised.
    """

    def __init__(
        self,
        module: Eagle3Module,
        rows: HeadRows | None,
        teacher: SharesHeadRows,
        loss: LossSection,
    ) -> None:
        ids = module.target_ids()
        super().__init__(
            vocab_size=module.config.vocab_size,
            ids=ids,
            teacher=teacher.head_rows(ids) if rows is None else rows,
            loss=loss,
        )
        self.module = module
        self._rows = rows
        self._target = teacher

    def hidden(self, packed: Packed) -> Tensor:
        """What the head gets at every step, [A, G, D]."""
        module = self.module
        wide = packed.features.to(module.fc.weight.dtype)
        features = module.fuse(list(wide.split(module.config.target_hidden_size, dim=-1)))
        x, residual = module.enter(self._embed(packed.context_tokens), features)
        context = module.keys_values(x, packed.context_positions)
        x, residual = x[packed.anchor_rows], residual[packed.anchor_rows]
        own: list[tuple[Tensor, Tensor]] = []
        attend = self._attend(packed, context, own)
        hidden = module.decode(x, residual, packed.anchors - 1, attend)
        normed, feature = module.outputs(hidden)
        out = [normed]
        for step in range(1, packed.labels.shape[1]):
            positions = packed.anchors - 1 + step
            x, residual = module.enter(self._embed(packed.previous[:, step]), feature)
            own.append(module.keys_values(x, positions))
            attend = self._attend(packed, context, own)
            normed, feature = module.outputs(module.decode(x, residual, positions, attend))
            out.append(normed)
        return torch.stack(out, dim=1)

    def _attend(
        self, packed: Packed, context: tuple[Tensor, Tensor], own: list[tuple[Tensor, Tensor]]
    ) -> Attend:
        attend, scale = make_step_attend(packed, context, own), self.module.scale
        return lambda queries: attend(queries * scale)

    def _embed(self, tokens: Tensor) -> Tensor:
        module = self.module
        rows = module.embed(tokens) if module.config.has_embedding else self._target.embed(tokens)
        return rows.to(module.fc.weight.dtype)

    def logits(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Logits of its own head or of the target's; see `DraftTraining.logits`."""
        if self._rows is not None:
            return head_logits(hidden, self._rows)
        logits = self.module.logits(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def confidence(self, hidden: Tensor, previous: Tensor) -> Tensor | None:
        """None: there is no confidence head."""
        return None

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of its own head."""
        return [] if self._rows is not None else list(self.module.lm_head.parameters())
