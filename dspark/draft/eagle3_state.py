"""What the EAGLE-3 drafter keeps of a request between rounds: K/V in buffers that grow by doubling.

Committed columns come first; columns of drafted nodes are written behind them for one round and
overwritten in the next, so rolling back is forgetting. Columns are not positions (eagle3.py).

Letters: N rows, M columns behind the committed ones, D draft width, H query heads, K key/value
heads, d head size, W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["DraftState"]

_TAIL = 16  # tokens compared to see that a context still extends what was seen
_FIRST_COLUMNS = 256


class DraftState:
    """What is kept of one request: K/V of its committed rows, and what its anchor's row gave.

    Attributes:
        keys: [K, capacity, d].
        values: The same.
        length: Committed columns.
        seen: Tokens of the context at the last call.
        tail: The last of them.
        logits: [1, W] of the anchor's row, or None if there is nothing to draft from.
        feature: [1, D] of the same row.
    """

    __slots__ = ("feature", "keys", "length", "logits", "seen", "tail", "values")

    def __init__(self, like: Tensor, heads: int, head_dim: int) -> None:
        self.keys = like.new_empty(heads, _FIRST_COLUMNS, head_dim)
        self.values = torch.empty_like(self.keys)
        self.length = 0
        self.seen = 0
        self.tail: list[int] = []
        self.logits: Tensor | None = None
        self.feature: Tensor | None = None

    def extends_to(self, tokens: Sequence[int]) -> bool:
        """Whether this context is the one seen last, or goes on from it."""
        start = self.seen - len(self.tail)
        return len(tokens) >= self.seen and list(tokens[start : self.seen]) == self.tail

    def note(self, tokens: Sequence[int]) -> None:
        """Remember this context as the one seen last."""
        if len(tokens) > self.seen:
            self.logits = self.feature = None  # of an anchor that is one no more
        self.seen, self.tail = len(tokens), list(tokens[-_TAIL:])

    def write(self, keys: Tensor, values: Tensor, behind: int = 0) -> None:
        """Put rows [N, K, d] `behind` columns after the committed ones, without committing."""
        start = self.length + behind
        stop = start + keys.shape[0]
        if stop > self.keys.shape[1]:
            # Doubling: a column is copied once on average, however long the context grows.
            columns = max(stop, 2 * self.keys.shape[1])
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_empty(old.shape[0], columns, old.shape[2])
                new[:, :start] = old[:, :start]
                setattr(self, name, new)
        self.keys[:, start:stop] = keys.transpose(0, 1)
        self.values[:, start:stop] = values.transpose(0, 1)

    def attend(self, queries: Tensor, visible: Tensor | None) -> Tensor:
        """Attention over the committed columns and those that follow them.

        Args:
            queries: Scaled, [N, H, d].
            visible: bool [N, M]: which of the M columns after the committed ones each row sees;
                None for M = 0.

        Returns:
            [N, H * d].
        """
        rows, heads, size = queries.shape
        groups = self.keys.shape[0]
        columns = self.length + (0 if visible is None else visible.shape[1])
        keys, values = self.keys[:, :columns], self.values[:, :columns]
        split = queries.reshape(rows, groups, -1, size).permute(1, 2, 0, 3)
        scores = (split.reshape(groups, -1, size) @ keys.mT).float()
        if visible is not None:
            behind = scores.view(groups, -1, rows, columns)[..., self.length :]
            behind.masked_fill_(~visible, -torch.inf)
        mixed = torch.softmax(scores, dim=-1).to(values.dtype) @ values
        return mixed.view(groups, -1, rows, size).permute(2, 0, 1, 3).reshape(rows, heads * size)
