"""Hidden states that forwards captured, gathered when somebody reads them.

Most rounds ask a drafter for nothing, and rows that it may want later need not be touched before.

Letters: L layers, n rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Captured", "Part", "parts_of", "rows_of", "side_by_side"]

_FEW_ROWS = 32  # of a forward that may be kept for the sake of one
_MOST_TIMES = 4  # as many rows as are wanted may be kept

Part: TypeAlias = tuple[Mapping[int, Tensor], Sequence[int]]
"""What a forward captured, and which of its rows are meant, in order."""


class Captured(Mapping[int, Tensor]):
    """{layer: [n, D]}, of rows of several forwards.

    Args:
        parts: Of each forward; with the same layers, and not written to afterwards.
    """

    __slots__ = ("_parts", "num_rows")

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self.num_rows = sum(len(rows) for _, rows in self._parts)

    def __getitem__(self, layer: int) -> Tensor:
        """Hidden states of a layer, [n, D]."""
        return _joined([_picked(hidden[layer], rows) for hidden, rows in self._parts])

    def __contains__(self, layer: object) -> bool:
        """Whether a layer was captured; gathers nothing."""
        return bool(self._parts) and layer in self._parts[0][0]

    def __iter__(self) -> Iterator[int]:
        return iter(self._parts[0][0] if self._parts else ())

    def __len__(self) -> int:
        return len(self._parts[0][0]) if self._parts else 0

    def side_by_side(self, layers: Sequence[int], device: torch.device) -> Tensor:
        """See the function of this name; fewer steps than layer by layer."""
        return _joined(
            [
                _picked(torch.cat([hidden[layer].to(device) for layer in layers], dim=-1), rows)
                for hidden, rows in self._parts
            ]
        )


def parts_of(hidden: Mapping[int, Tensor], wanted: Sequence[Sequence[int]]) -> list[Part]:
    """Share out what a forward captured.

    A part keeps the whole forward in memory until it is read. So who wants little of a large one,
    as beside somebody's prompt, gets a copy, one for all of them.

    Args:
        hidden: {layer: [n, D]} of the forward.
        wanted: Rows of each, in order.

    Returns:
        One part for each.
    """
    size = next((int(rows.shape[0]) for rows in hidden.values()), 0)
    parts: list[Part] = [(hidden, rows) for rows in wanted]
    few = [i for i, rows in enumerate(wanted) if size > max(_FEW_ROWS, _MOST_TIMES * len(rows))]
    picked = [row for i in few for row in wanted[i]]
    if not picked:
        return parts
    index = torch.tensor(picked)
    own = {layer: rows[index.to(rows.device)] for layer, rows in hidden.items()}
    start = 0
    for i in few:
        stop = start + len(wanted[i])
        parts[i] = own, range(start, stop)
        start = stop
    return parts


def rows_of(features: Mapping[int, Tensor]) -> int:
    """How many rows such a mapping has."""
    if isinstance(features, Captured):
        return features.num_rows
    return next((int(rows.shape[0]) for rows in features.values()), 0)


def side_by_side(
    features: Mapping[int, Tensor], layers: Sequence[int], device: torch.device
) -> Tensor:
    """Hidden states of some layers beside each other.

    Args:
        features: {layer: [n, D]}, any mapping.
        layers: Which, in order.
        device: Where they are wanted.

    Returns:
        [n, L * D].
    """
    if isinstance(features, Captured):
        return features.side_by_side(layers, device)
    return torch.cat([features[layer].to(device) for layer in layers], dim=-1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _picked(hidden: Tensor, rows: Sequence[int]) -> Tensor:
    first, count = rows[0], len(rows)
    if rows[-1] - first + 1 == count:  # they ascend
        return hidden[first : first + count]
    return hidden[list(rows)]
