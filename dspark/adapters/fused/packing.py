"""Weights in the layout that the kernels read: panels of outputs, one vector after another.

A panel holds 2 * lanes outputs. In float32 it is [I, 2 * lanes]; as bfloat16 it is
[I / 2, 2, lanes, 2]: two neighbouring inputs of an output share one 32-bit word, which a shift and
a mask widen to two floats. Weights are kept as bfloat16 wherever that loses nothing, also under a
float32 model: most checkpoints are stored so, and it halves the bytes of a step.

Quantised weights (dspark.adapters.quantise): int8 is [I / 4, 2, lanes, 4] bytes, 128 more than the
number. int4 is, for every GROUP inputs, [GROUP / 8, 2, lanes, 4] bytes, input i of eight in the low
half of byte i and input 4 + i in its high half, then [2, lanes] words, the step in the low half and
the least value in the high one.
Letters: I inputs, O outputs, P panels, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspark.adapters.fused.pages import place
from dspark.adapters.quantise import GROUP, Int4Weight, Int8Weight, quantise

__all__ = ["KINDS", "PackedMatrix", "pack_gated", "pack_stacked"]


KINDS = ("float32", "bfloat16", "int8", "int4")
"""How weights are stored; the kernels know them by their place here."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A weight [O, I] packed for the kernels.

    Attributes:
        data: The panels.
        bias: Float32 [P * 2 * lanes], or None.
        scale: Float32 [P * 2 * lanes] of int8, else None.
        inputs: I.
        outputs: O.
        panels: P.
        kind: One of KINDS.
    """

    data: Tensor
    bias: Tensor | None
    scale: Tensor | None
    inputs: int
    outputs: int
    panels: int
    kind: str

    def unpack(self) -> Tensor:
        """The weight again, [O, I]: bfloat16 if it is stored so, else float32."""
        if self.kind == "int8":
            rows = self.data.permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 2).float() - 128
            scale = torch.ones(()) if self.scale is None else self.scale[:, None]
            return (rows * scale)[: self.outputs].contiguous()
        if self.kind == "int4":
            return _unpack_int4(self.data, self.inputs)[: self.outputs].contiguous()
        rows = self.data.permute(0, 2, 3, 1).flatten(0, 2)[: self.outputs].contiguous()
        return rows.view(torch.bfloat16) if self.kind == "bfloat16" else rows


def pack_stacked(linears: Sequence[nn.Linear], lanes: int, quant: str = "none") -> PackedMatrix:
    """Pack linear layers over the same input as one, their outputs side by side.

    Args:
        linears: The layers.
        lanes: Floats of a vector.
        quant: What to round the weights to.
    """
    weight = torch.cat([linear.weight.detach() for linear in linears])
    return _pack(weight, _stacked_bias(linears), lanes, quant)


def pack_gated(gate: nn.Linear, up: nn.Linear, lanes: int, quant: str = "none") -> PackedMatrix:
    """Pack a gate and what it gates so that both halves of a panel meet in registers."""
    weights = [linear.weight.detach().view(-1, lanes, linear.in_features) for linear in (gate, up)]
    bias = _stacked_bias([gate, up])
    if bias is not None:
        bias = torch.stack(bias.view(2, -1, lanes).unbind(), dim=1).flatten()
    return _pack(torch.stack(weights, dim=1).flatten(0, 2), bias, lanes, quant)


def _stacked_bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat([_bias(linear) for linear in linears])


def _bias(linear: nn.Linear) -> Tensor:
    return torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach().float()


def _pack(weight: Tensor, bias: Tensor | None, lanes: int, quant: str) -> PackedMatrix:
    outputs, inputs = weight.shape
    panels = -(-outputs // (2 * lanes))
    missing = panels * 2 * lanes - outputs
    if missing:
        weight = nn.functional.pad(weight, (0, 0, 0, missing))
        bias = None if bias is None else nn.functional.pad(bias, (0, missing))
    kind, scale = quant, None
    if quant == "none":
        is_half = weight.dtype == torch.bfloat16 or torch.equal(weight.bfloat16().float(), weight)
        kind = "bfloat16" if is_half else "float32"
        words = weight.bfloat16().contiguous().view(torch.int32) if is_half else weight
        data = words.view(panels, 2, lanes, -1).permute(0, 3, 1, 2).contiguous()
    else:
        rounded = quantise(weight, quant)
        if isinstance(rounded, Int8Weight):
            scale, data = rounded.scale, _pack_int8(rounded, lanes)
        else:
            data = _pack_int4(rounded, lanes)
    return PackedMatrix(place(data), bias, scale, inputs, outputs, panels, kind)


def _pack_int8(weight: Int8Weight, lanes: int) -> Tensor:
    """Bytes [P, I / 4, 2, lanes, 4]."""
    shifted = (weight.values.short() + 128).to(torch.uint8)
    return shifted.view(-1, 2, lanes, shifted.shape[1] // 4, 4).permute(0, 3, 1, 2, 4).contiguous()


def _pack_int4(weight: Int4Weight, lanes: int) -> Tensor:
    """Bytes [P, G, GROUP / 8 + 1, 2, lanes, 4]; the last of a group are step and least value."""
    groups = weight.step.shape[1]
    values = weight.values.view(-1, 2, lanes, groups, GROUP // 8, 2, 4)
    halves = (values[..., 0, :] | (values[..., 1, :] << 4)).permute(0, 3, 4, 1, 2, 5)
    both = torch.stack([weight.step, weight.least], dim=-1).view(torch.uint8)
    both = both.view(-1, 2, lanes, groups, 4).permute(0, 3, 1, 2, 4)
    return torch.cat([halves, both[:, :, None]], dim=2).contiguous()


def _unpack_int4(data: Tensor, inputs: int) -> Tensor:
    """What `_pack_int4` packed, float32 [P * 2 * lanes, I]."""
    halves = data[:, :, :-1].permute(0, 3, 4, 1, 2, 5)  # [P, 2, lanes, G, GROUP / 8, 4]
    values = torch.stack([halves & 15, halves >> 4], dim=-2).flatten(4)
    both = data[:, :, -1].permute(0, 2, 3, 1, 4).contiguous().view(torch.bfloat16)
    rows = values.flatten(0, 2)
    step, least = both.flatten(0, 2).unbind(-1)
    return Int4Weight(rows.flatten(1)[:, :inputs], step, least).dequantise()
