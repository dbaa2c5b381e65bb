"""Rounding of activations as the release's kernels do it, an option for comparison with them.

Everything here is off by default: it is noise but for the indexer, where it can change which
entries are chosen. Source: facts of the released kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark.base_model.fp4 import fp4_act_quant
from dspark.base_model.fp8 import act_quant

__all__ = ["round_index", "round_rows"]

_ROW_GROUP = 64
_INDEX_GROUP = 32


def round_rows(rows: Tensor, rotated: int) -> Tensor:
    """Keys of attention after their rotation: all but the rotated dims to FP8, groups of 64.

    Args:
        rows: [n, c].
        rotated: The last dims, which stay as they are.
    """
    plain = rows.shape[-1] - rotated
    group = _ROW_GROUP if plain % _ROW_GROUP == 0 else plain
    return torch.cat((act_quant(rows[..., :plain], group), rows[..., plain:]), dim=-1)


def round_index(x: Tensor) -> Tensor:
    """Queries and keys of the indexer after their rotation: Hadamard transform, then FP4.

    Args:
        x: [..., d], d a power of two.
    """
    d = x.shape[-1]
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    width = 1
    while width < d:
        pairs = y.unflatten(-1, (-1, 2, width))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        width *= 2
    return fp4_act_quant((y * d**-0.5).to(x.dtype), min(_INDEX_GROUP, d))
