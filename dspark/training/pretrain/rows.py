"""Rows of tokens to train and to validate on; every row is a function of the seed and its number.

An epoch is all documents of the split in an order of its own, cut into rows of equal length behind
one another, and these rows in an order of their own again. A row holds one token more than its
length, the label of the last. What is left over at an epoch's end is dropped.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.errors import DataError
from dspark.training.pretrain.tokenizer import Tokens

__all__ = ["TrainingRows", "held_out_rows"]


class TrainingRows:
    """Rows of the training split.

    Args:
        tokens: The collection.
        seed: Of the orders.
    """

    def __init__(self, tokens: Tokens, seed: int) -> None:
        self._tokens, self._seed = tokens, seed
        self._key: tuple[int, int] | None = None
        self._rows: NDArray[np.int64] = np.empty((0, 0), dtype=np.int64)
        kinds = tokens.kinds("train")
        self._documents = [
            (kind, i) for kind in kinds for i in range(tokens.streams["train", kind].documents)
        ]

    def per_epoch(self, length: int) -> int:
        """Rows of an epoch."""
        return (self._tokens.count("train") - 1) // length

    def at(self, first: int, count: int, length: int) -> Tensor:
        """Rows first .. first + count - 1 of an endless run of epochs, int64 [count, length + 1].

        Raises:
            DataError: If the text is shorter than a row.
        """
        size = self.per_epoch(length)
        if size < 1:
            raise DataError(
                f"the training text has {self._tokens.count('train')} tokens, but a sequence "
                f"needs {length + 1}."
            )
        picked = []
        for number in range(first, first + count):
            epoch, place = divmod(number, size)
            self._prepare(epoch, length)
            picked.append(self._rows[place])
        return torch.from_numpy(np.stack(picked))

    def _prepare(self, epoch: int, length: int) -> None:
        if self._key == (epoch, length):
            return
        draws = np.random.default_rng([self._seed, epoch])
        order = draws.permutation(len(self._documents))
        parts = []
        for place in order:
            kind, index = self._documents[place]
            parts.append(self._tokens.streams["train", kind].document(index))
        stream = np.concatenate(parts)
        size = self.per_epoch(length)
        starts = draws.permutation(size)[:, None] * length
        self._rows = stream[starts + np.arange(length + 1)]
        self._key = (epoch, length)


def held_out_rows(tokens: Tokens, kind: str, length: int, count: int) -> Tensor:
    """Up to `count` rows of held-out text of a kind, spread over it: int64 [rows, length + 1]."""
    stream = tokens.streams["held-out", kind].tokens
    size = (len(stream) - 1) // length
    places = np.unique(np.linspace(0, max(size - 1, 0), min(count, size)).astype(np.int64))
    if size < 1:
        return torch.empty(0, length + 1, dtype=torch.int64)
    rows = [stream[p * length : p * length + length + 1] for p in places]
    return torch.from_numpy(np.stack(rows).astype(np.int64))
