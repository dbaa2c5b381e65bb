"""The layout of a forward: several sequences, their anchors, the blocks at these anchors.

As DeepSpec trained: an anchor is a position s with a loss whose next token has one too; the slots
of its block stand at s, s + 1, ...; slot 0 gets token s, the others the mask token; the context is
the target's hidden states at positions strictly before s. Depth k = 1 .. gamma is predicted by slot
first + k - 1: its label is token s + k, its teacher the target's law at position s + k - 1, and
what the sequential head sees before it is token s + k - 1 of the text. A depth is valid up to the
last token of the sequence.

A draft that is unrolled step by step is laid out alike: it has a slot per step and no mask token;
its context are the pairs (hidden state at t, token t + 1) for t before s, the last of which has the
anchor for its token, and step k gets the text's token s + k - 1.

Letters: A anchors, S slots, G = gamma, C context rows, n rows with a law, Dt hidden size of the
target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dspark.training.features import Features
from dspark.training.samples import IntArray, Sample

__all__ = ["BlockShape", "Group", "Packed", "pack", "position_weights", "total_weight"]

_GROUP = 32  # anchors of a sequence whose attention is computed at once


class BlockShape(Protocol):
    """What a draft does with an anchor; `DSparkConfig` is one."""

    @property
    def gamma(self) -> int:
        """Depths that are predicted."""
        ...

    @property
    def block_size(self) -> int:
        """Slots."""
        ...

    @property
    def first_slot(self) -> int:
        """The first slot that predicts."""
        ...

    @property
    def mask_token_id(self) -> int:
        """Token of the slots behind the anchor's."""
        ...


@dataclass(frozen=True, slots=True)
class Group:
    """Some anchors of one sequence.

    Attributes:
        start: First anchor.
        stop: One past the last.
        context: First row of the sequence's context.
        columns: Context rows that the last anchor sees: all positions before it.
    """

    start: int
    stop: int
    context: int
    columns: int


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Tensors of one forward.

    Attributes:
        features: [C, L * Dt], captured hidden states of all sequences' context.
        context_positions: int64 [C].
        context_tokens: int64 [C], token after each position.
        anchors: int64 [A], position of each anchor in its sequence.
        anchor_rows: int64 [A], context row of the position before each anchor.
        groups: Which anchors belong together.
        block_tokens: int64 [A, S].
        previous: int64 [A, S], token before the one that a slot predicts; column 0 is the anchor.
        labels: int64 [A, G].
        weights: float32 [A, G], weight of each depth, 0 where it is not valid.
        teacher: int64 [A, G], row of `final` with the target's law.
        final: [n, Dt], what the output head gets.
        total: float32 [n], see `Features`.
        best: int64 [n], see `Features`.
    """

    features: Tensor
    context_positions: Tensor
    context_tokens: Tensor
    anchors: Tensor
    anchor_rows: Tensor
    groups: tuple[Group, ...]
    block_tokens: Tensor
    previous: Tensor
    labels: Tensor
    weights: Tensor
    teacher: Tensor
    final: Tensor
    total: Tensor
    best: Tensor

    @property
    def num_anchors(self) -> int:
        """A."""
        return int(self.anchors.shape[0])


def position_weights(gamma: int, decay: float | None) -> IntArray:
    """Weights exp(-(k - 1) / decay) of depths 1 .. gamma; float64 [gamma].

    **Source:** DSpark, arXiv 2607.05147, equation 12.
    """
    scale = gamma if decay is None else decay
    weights: IntArray = np.exp(-np.arange(gamma) / scale)
    return weights


def total_weight(
    samples: Sequence[tuple[Sample, IntArray]], gamma: int, weights: IntArray
) -> float:
    """Weights of all valid depths of some samples' anchors, added: the loss is divided by it.

    Args:
        samples: Samples and their anchors.
        gamma: Depths of a block.
        weights: float64 [gamma], from `position_weights`.
    """
    cumulative = np.concatenate([[0.0], np.cumsum(weights)])
    sums = [
        float(cumulative[np.minimum(sample.length - 1 - anchors, gamma)].sum())
        for sample, anchors in samples
    ]
    return math.fsum(sums)


def pack(
    samples: Sequence[tuple[Sample, IntArray]],
    features: Sequence[Features],
    shape: BlockShape,
    weights: IntArray,
    *,
    device: torch.device,
) -> Packed:
    """Lay out a forward.

    Args:
        samples: Samples and their anchors, at least one each.
        features: What the target says of them.
        shape: What the draft does with an anchor.
        weights: float64 [gamma], from `position_weights`.
        device: Where the module is.

    Returns:
        The tensors.
    """
    groups: list[Group] = []
    blocks: list[dict[str, IntArray]] = []
    hidden, positions, tokens = [], [], []
    first, row, law = 0, 0, 0
    for (sample, anchors), own in zip(samples, features, strict=True):
        columns = int(anchors[-1])
        hidden.append(own.hidden[:columns])
        positions.append(np.arange(columns))
        tokens.append(sample.tokens[1 : columns + 1])
        for start in range(0, len(anchors), _GROUP):
            part = anchors[start : start + _GROUP]
            begin = first + start
            groups.append(Group(begin, begin + len(part), row, int(part[-1])))
        blocks.append({**_blocks(sample, anchors, shape, weights, law), "rows": row + anchors - 1})
        first += len(anchors)
        row += columns
        law += own.final.shape[0]

    def gather(name: str, dtype: torch.dtype = torch.int64) -> Tensor:
        joined = np.concatenate([block[name] for block in blocks])
        return torch.from_numpy(joined).to(device, dtype)

    return Packed(
        features=torch.cat(hidden).to(device),
        context_positions=torch.from_numpy(np.concatenate(positions)).to(device),
        context_tokens=torch.from_numpy(np.concatenate(tokens)).to(device),
        anchors=gather("anchors"),
        anchor_rows=gather("rows"),
        groups=tuple(groups),
        block_tokens=gather("tokens"),
        previous=gather("previous"),
        labels=gather("labels"),
        weights=gather("weights", torch.float32),
        teacher=gather("teacher"),
        final=torch.cat([own.final for own in features]).to(device),
        total=torch.cat([own.total for own in features]).to(device),
        best=torch.cat([own.best for own in features]).to(device),
    )


def _blocks(
    sample: Sample, anchors: IntArray, shape: BlockShape, weights: IntArray, law: int
) -> dict[str, IntArray]:
    gamma, slots, first = shape.gamma, shape.block_size, shape.first_slot
    depth = np.arange(gamma)[None]
    last = sample.length - 1
    before = anchors[:, None] + depth  # position of the token before the predicted one
    is_valid = before < last
    before = np.minimum(before, last - 1)
    tokens = np.full((len(anchors), slots), shape.mask_token_id, dtype=np.int64)
    tokens[:, 0] = sample.tokens[anchors]
    previous = np.empty((len(anchors), slots), dtype=np.int64)
    previous[:, 0] = sample.tokens[anchors]
    previous[:, first:] = sample.tokens[before]
    return {
        "anchors": anchors,
        "tokens": tokens,
        "previous": previous,
        "labels": sample.tokens[before + 1],
        "weights": np.where(is_valid, weights[None], 0.0),
        "teacher": before - sample.start + law,
    }
