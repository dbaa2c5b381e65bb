"""Whole draft trees grown by the kernels (kernels/grow.h), around one C call.

Letters: B trees, G depths, V vocabulary, Vd draft vocabulary, K rank of the sequential head,
D hidden size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark.adapters.fused import structures
from dspark.adapters.fused.library import Library
from dspark.adapters.fused.packing import PackedMatrix
from dspark.draft.block_runner import Ask
from dspark.draft.calibration import SurvivalMap
from dspark.tree_build import TreeGrower

__all__ = ["Growth", "Heads"]


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """What a module's trees follow from besides base logits.

    Attributes:
        first: [V, K], the sequential head's first matrix, float32 or bfloat16; None without one.
        second: Its second matrix, packed; None without one.
        ids: int64 [Vd], tokens of the draft's vocabulary; None for all.
        is_rounded: Whether a bias is rounded to bfloat16.
    """

    first: Tensor | None
    second: PackedMatrix | None
    ids: Tensor | None
    is_rounded: bool


class Growth:
    """Grows trees; keeps its working memory from call to call.

    Args:
        library: The kernels.
        heads: The module's.
    """

    def __init__(self, library: Library, heads: Heads) -> None:
        self._library, self._heads = library, heads
        self._rank = 0 if heads.first is None else int(heads.first.shape[1])
        self._logits = torch.empty(0)
        self._maps: dict[int, tuple[SurvivalMap, int, list[np.ndarray], structures.Rating]] = {}

    def grow(
        self,
        asks: Sequence[Ask],
        base: Tensor,
        sure: np.ndarray | None,
        sure_of_token: np.ndarray | None,
    ) -> list[TreeGrower] | None:
        """Trees of one level of nodes after another.

        Args:
            asks: One per tree, B >= 1.
            base: float32 [.., G, Vd], contiguous; `Ask.request` says which row is whose.
            sure: float32 [.., G], confidence logits but for the token's part; None for none.
            sure_of_token: float32 [K], by which a token's row of `first` adds to that; or None.

        Returns:
            The trees; None if a logit was no number.
        """
        heads, columns = self._heads, int(base.shape[2])
        nodes = [
            np.empty((4, max(1, ask.width * (1 + ask.beams * max(0, ask.depth - 1)))), np.int64)
            for ask in asks
        ]
        noises = [_noise(ask) for ask in asks]
        most = max(max(ask.width, ask.depth) for ask in asks)
        ratings = [None if ask.rating is None else self._rating(ask.rating, most) for ask in asks]
        grown = [
            _grown(ask, room, noise, rating, columns)
            for ask, room, noise, rating in zip(asks, nodes, noises, ratings, strict=True)
        ]
        pointers = (ctypes.c_void_p * len(grown))(*(ctypes.addressof(one) for one in grown))
        rows = sum(max(1, ask.beams) for ask in asks)
        floats = rows * (columns + self._rank)
        if self._logits.numel() < floats:
            self._logits = torch.empty(floats)
        work = self._logits.data_ptr()
        step = structures.Growing(
            requests=len(grown),
            columns=columns,
            depths=int(base.shape[1]),
            threads=torch.get_num_threads(),
            rank=self._rank,
            grown=ctypes.addressof(pointers),
            bias=structures.Matrix() if heads.second is None else structures.matrix(heads.second),
            first=structures.address(heads.first),
            is_half=int(heads.first is not None and heads.first.dtype == torch.bfloat16),
            base=base.data_ptr(),
            ids=structures.address(heads.ids),
            sure=None if sure is None else sure.ctypes.data,
            sure_of_token=None if sure_of_token is None else sure_of_token.ctypes.data,
            rows=rows,
            latent=work + 4 * rows * columns,
            logits=work,
        )
        self._library.grow(ctypes.addressof(step), int(heads.is_rounded))
        if any(one.count < 0 for one in grown):
            return None
        return [_tree(room, one.count) for room, one in zip(nodes, grown, strict=True)]

    def _rating(self, chosen: SurvivalMap, size: int) -> structures.Rating:
        """A map's structure for so many ranks and depths, kept for the next call."""
        kept = self._maps.get(id(chosen))
        if kept is None or kept[0] is not chosen or kept[1] < size:
            arrays = [
                np.concatenate([values, np.full(max(0, size - len(values)), values[-1])])
                for values in (
                    chosen.bias,
                    chosen.share,
                    chosen.lift,
                    chosen.confidence,
                    chosen.depth,
                    chosen.temperature,
                )
            ]
            made = structures.Rating(*(array.ctypes.data for array in arrays))
            kept = self._maps[id(chosen)] = (chosen, size, arrays, made)
        return kept[3]


def _grown(
    ask: Ask,
    room: np.ndarray,
    noise: ctypes.Array[ctypes.c_void_p] | None,
    rating: structures.Rating | None,
    columns: int,
) -> structures.Grown:
    return structures.Grown(
        ask.request,
        ask.budget,
        ask.depth,
        ask.width,
        min(ask.count, columns),
        ask.beams,
        ask.anchor,
        room.shape[1],
        ask.min_survival,
        ask.temperature,
        None if noise is None else ctypes.addressof(noise),
        None if rating is None else ctypes.addressof(rating),
        0,
        *(row.ctypes.data for row in room),
    )


def _noise(ask: Ask) -> ctypes.Array[ctypes.c_void_p] | None:
    if ask.noise is None:
        return None
    return (ctypes.c_void_p * len(ask.noise))(*(row.ctypes.data for row in ask.noise))


def _tree(room: np.ndarray, count: int) -> TreeGrower:
    tree = TreeGrower()
    tree.token, tree.parent, tree.depth = (row[:count].tolist() for row in room[:3])
    tree.survival = room[3].view(np.float64)[:count].tolist()
    return tree
