"""Attention of packed anchors: each slot sees its sequence's context and its own block.

A step of an unrolled draft sees the context and its own anchor's steps so far. One softmax over
both: context scores of some anchors are one product, block scores a batched one, and no mask of all
slots times all columns is ever made.

Letters: A anchors of a group, S slots, H query heads, J key/value heads, g = H / J, E head size,
C context columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dspark.draft.backbone import Attend
from dspark.draft.dspark_config import Window
from dspark.training.packing import Group, Packed

__all__ = ["make_attend", "make_step_attend"]


def make_attend(
    packed: Packed,
    context: Sequence[tuple[Tensor, Tensor]],
    windows: Sequence[Window | None],
    slots: int,
) -> Attend:
    """The attention of one forward, as `DSparkModule.block` asks for it.

    Args:
        packed: The forward's layout.
        context: Keys and values [C, J, E] of every layer, all sequences one after another.
        windows: What each layer sees.
        slots: S.
    """
    masks: dict[tuple[int, Window | None], tuple[int, Tensor | None]] = {}

    def mask_of(index: int, window: Window | None) -> tuple[int, Tensor | None]:
        key = (index, window)
        if key not in masks:
            masks[key] = _mask(packed, packed.groups[index], window, slots)
        return masks[key]

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        shape = (-1, slots, *queries.shape[1:])
        every = queries.view(shape)
        own_keys = keys.view(-1, slots, *keys.shape[1:])
        own_values = values.view(-1, slots, *values.shape[1:])
        parts = []
        for index, group in enumerate(packed.groups):
            first, hidden = mask_of(index, windows[layer])
            seen = slice(group.context + first, group.context + group.columns)
            block = slice(group.start, group.stop)
            key, value = context[layer]
            parts.append(
                _attend(
                    every[block],
                    (own_keys[block], own_values[block]),
                    (key[seen], value[seen]),
                    hidden,
                )
            )
        return torch.cat(parts).view(queries.shape)

    return attend


def make_step_attend(
    packed: Packed, context: tuple[Tensor, Tensor], own: Sequence[tuple[Tensor, Tensor]]
) -> Callable[[Tensor], Tensor]:
    """The attention of one step of an unrolled draft, a row per anchor.

    Args:
        packed: The forward's layout.
        context: Keys and values [C, J, E] of the context rows; an anchor sees those before it.
        own: Keys and values [A, J, E] of the anchors' rows of step 2 up to this one.

    Returns:
        Scaled queries [A, H, E] -> [A, H * E].
    """
    shape = (packed.num_anchors, 0, *context[0].shape[1:])
    keys, values = (
        torch.stack(parts, dim=1) if parts else context[i].new_empty(shape)
        for i, parts in enumerate(([k for k, _ in own], [v for _, v in own]))
    )

    def attend(queries: Tensor) -> Tensor:
        parts = []
        for group in packed.groups:
            seen = slice(group.context, group.context + group.columns)
            block = slice(group.start, group.stop)
            _, hidden = _mask(packed, group, None, len(own))
            parts.append(
                _attend(
                    queries[block][:, None],
                    (keys[block], values[block]),
                    (context[0][seen], context[1][seen]),
                    hidden,
                )
            )
        return torch.cat(parts).flatten(1)

    return attend


def _mask(
    packed: Packed, group: Group, window: Window | None, slots: int
) -> tuple[int, Tensor | None]:
    """First context column that any anchor of a group sees, and which cells are hidden.

    Returns:
        (column, bool [A, S or 1, C + S], True where hidden; None if nothing is).
    """
    anchors = packed.anchors[group.start : group.stop]
    first = 0
    if window is not None:
        first = max(0, int(anchors[0]) - window.size + window.moves)
    if window is None and anchors.shape[0] == 1:
        return first, None
    device = anchors.device
    column = torch.arange(first, group.columns, device=device)[None, None]
    anchor = anchors[:, None, None]
    rows = 1 if window is None else slots
    slot = torch.arange(rows, device=device)[None, :, None]
    hidden = (column >= anchor).expand(-1, rows, -1)
    if window is not None:
        moved = slot if window.moves else torch.zeros_like(slot)
        hidden = hidden | (column < anchor - window.size + moved + window.moves)
    own = torch.zeros(rows, slots, dtype=torch.bool, device=device)
    if window is not None and window.is_causal:
        own = torch.ones_like(own).triu(1)
    return first, torch.cat([hidden, own.expand(anchors.shape[0], -1, -1)], dim=-1)


def _attend(
    queries: Tensor,
    block: tuple[Tensor, Tensor],
    context: tuple[Tensor, Tensor],
    hidden: Tensor | None,
) -> Tensor:
    """Attention of one group.

    Args:
        queries: [A, S, H, E], scaled.
        block: Keys and values [A, B, J, E] of what each anchor has of its own.
        context: Keys and values [C, J, E].
        hidden: From `_mask`.

    Returns:
        [A, S, H, E].
    """
    anchors, slots, heads, size = queries.shape
    shared = block[0].shape[2]
    group = heads // shared
    rows = queries.view(anchors, slots, shared, group, size).permute(2, 0, 3, 1, 4)
    rows = rows.reshape(shared, anchors, group * slots, size)
    columns = context[0].shape[0]
    far = torch.matmul(rows.flatten(1, 2), context[0].permute(1, 2, 0))
    near = torch.matmul(rows, block[0].permute(2, 0, 3, 1))
    scores = torch.cat([far.view(shared, anchors, group * slots, columns), near], dim=-1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if hidden is not None:
        cells = scores.view(shared, anchors, group, slots, -1)
        scores = cells.masked_fill(hidden[None, :, None], -torch.inf).view(scores.shape)
    weights = torch.softmax(scores, dim=-1).to(queries.dtype)
    far_weights = weights[..., :columns].reshape(shared, -1, columns)
    out = torch.matmul(far_weights, context[1].transpose(0, 1)).view(rows.shape)
    out = out + torch.matmul(weights[..., columns:], block[1].permute(2, 0, 1, 3))
    out = out.view(shared, anchors, group, slots, size).permute(1, 3, 0, 2, 4)
    return out.reshape(anchors, slots, heads, size)
