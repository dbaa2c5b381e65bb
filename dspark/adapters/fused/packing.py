"""Weights in the layout that the kernels read: panels of outputs, one vector after another.

A panel holds 2 * lanes outputs. In float32 it is [I, 2 * lanes]; as bfloat16 it is
[I / 2, 2, lanes, 2]: two neighbouring inputs of an output share one 32-bit word, which a shift and
a mask widen to two floats. Weights are kept as bfloat16 wherever that loses nothing, also under a
float32 model: most checkpoints are stored so, and it halves the bytes of a step.
Letters: I inputs, O outputs, P panels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["PackedMatrix", "pack_gated", "pack_stacked"]


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A weight [O, I] packed for the kernels.

    Attributes:
        data: The panels.
        bias: Float32 [P * 2 * lanes], or None.
        inputs: I.
        outputs: O.
        panels: P.
        is_half: Stored as bfloat16.
    """

    data: Tensor
    bias: Tensor | None
    inputs: int
    outputs: int
    panels: int
    is_half: bool

    def unpack(self) -> Tensor:
        """The weight again, [O, I]; bfloat16 or float32 as it is stored."""
        rows = self.data.permute(0, 2, 3, 1).flatten(0, 2)[: self.outputs].contiguous()
        return rows.view(torch.bfloat16) if self.is_half else rows


def pack_stacked(linears: Sequence[nn.Linear], lanes: int) -> PackedMatrix:
    """Pack linear layers over the same input as one, their outputs side by side.

    Args:
        linears: The layers.
        lanes: Floats of a vector.
    """
    weight = torch.cat([linear.weight.detach() for linear in linears])
    return _pack(weight, _stacked_bias(linears), lanes)


def pack_gated(gate: nn.Linear, up: nn.Linear, lanes: int) -> PackedMatrix:
    """Pack a gate and what it gates so that both halves of a panel meet in registers."""
    weights = [linear.weight.detach().view(-1, lanes, linear.in_features) for linear in (gate, up)]
    bias = _stacked_bias([gate, up])
    if bias is not None:
        bias = torch.stack(bias.view(2, -1, lanes).unbind(), dim=1).flatten()
    return _pack(torch.stack(weights, dim=1).flatten(0, 2), bias, lanes)


def _stacked_bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat([_bias(linear) for linear in linears])


def _bias(linear: nn.Linear) -> Tensor:
    return torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach().float()


def _pack(weight: Tensor, bias: Tensor | None, lanes: int) -> PackedMatrix:
    outputs, inputs = weight.shape
    panels = -(-outputs // (2 * lanes))
    missing = panels * 2 * lanes - outputs
    is_half = weight.dtype == torch.bfloat16 or torch.equal(weight.bfloat16().float(), weight)
    if missing:
        weight = nn.functional.pad(weight, (0, 0, 0, missing))
        bias = None if bias is None else nn.functional.pad(bias, (0, missing))
    words = weight.bfloat16().contiguous().view(torch.int32) if is_half else weight
    data = words.view(panels, 2, lanes, -1).permute(0, 3, 1, 2).contiguous()
    return PackedMatrix(data, bias, inputs, outputs, panels, is_half)
