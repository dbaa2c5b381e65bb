"""What the DSpark drafter asks of a module that predicts a block of positions at once.

`DSparkModule` (drafts for wrapped targets) and DeepSeek-V4's own stages meet it.

Letters: n rows, S slots, D hidden size, H query heads, J key/value heads, E head size, L rows seen,
Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dspark.draft.backbone import Attend
from dspark.draft.dspark_config import Window
from dspark.mtp_head import DraftVocab, MarkovHead

__all__ = ["BlockModule", "BlockSettings"]


class BlockSettings(Protocol):
    """Facts about a module."""

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        """Layers of the target that it reads."""
        ...

    @property
    def block_size(self) -> int:
        """Slots of a block."""
        ...

    @property
    def mask_token_id(self) -> int:
        """Token of the slots behind the anchor's."""
        ...

    @property
    def gamma(self) -> int:
        """Tokens of a drafted path at the most."""
        ...

    @property
    def first_slot(self) -> int:
        """Slot that predicts depth 1."""
        ...


class BlockModule(Protocol):
    """A module that predicts a block."""

    @property
    def config(self) -> BlockSettings:
        """Facts about it."""
        ...

    @property
    def vocab(self) -> DraftVocab:
        """The tokens it can propose."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def windows(self) -> Sequence[Window | int | None]:
        """What each layer sees of the context; a number is the positions before the anchor."""
        ...

    @property
    def markov_head(self) -> MarkovHead | None:
        """Its sequential head, None for DFlash."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [n, D] of token ids int64 [n]."""
        ...

    def combine(self, features: Tensor) -> Tensor:
        """Context vectors [n, D] of captured hidden states, side by side."""
        ...

    def context(self, c: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [n, J, E] of every layer for context vectors [n, D]."""
        ...

    def block(self, rows: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [n, D] of embedded block rows."""
        ...

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention [S, H, E] of one request's slots over keys and values [J, L, E].

        Args:
            layer: Index of the layer.
            queries: [S, H, E], as `block` hands them to its `attend`.
            keys: Context, then block.
            values: The same.
            mask: bool [S, L], True where seen; None for everywhere.
        """
        ...

    def base_logits(self, hidden: Tensor) -> Tensor:
        """Base logits [n, Vd] of hidden states [n, D]."""
        ...

    def confidence(self, hidden: Tensor, tokens: Tensor) -> Tensor | None:
        """Confidence logits float32 [n] after tokens int64 [n], None without such a head."""
        ...
