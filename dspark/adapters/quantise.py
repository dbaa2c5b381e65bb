"""Weights rounded to int8 or int4: one definition for the kernels and for stock modules.

int8 has one scale per output. int4 has a step and a least value per output and GROUP inputs, as
llama.cpp's Q4_1 has; the output head is int8 there, because its rounding moves every logit. A
quantised target is a model of its own: speculation is lossless against it, and whichever path runs
it, its weights are the numbers that `dequantise` gives.
Letters: O outputs, I inputs, G = I / GROUP groups.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dspark.errors import CapabilityError

__all__ = [
    "GROUP",
    "Int4Weight",
    "Int8Weight",
    "QuantisedWeight",
    "head_quant",
    "quantise",
    "quantise_modules",
]

GROUP = 32
"""Inputs that share a step and a least value in int4."""

_SHRINKS = (0.94, 0.88, 0.82)
"""Shares of a group's range that its sixteen values are tried to cover, besides all of it."""

_KEPT = 0.01
"""Mean squared error, in squared steps, up to which weights count as four-bit numbers already;
weights that are spread evenly have 1/12."""


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """A weight as whole numbers and a scale per output.

    Attributes:
        values: int8 [O, I], -127 to 127.
        scale: Float32 [O].
    """

    values: Tensor
    scale: Tensor

    def dequantise(self) -> Tensor:
        """The weight, float32 [O, I]."""
        return self.values.float() * self.scale[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """A weight as four-bit numbers, with a step and a least value per group.

    Attributes:
        values: uint8 [O, I], 0 to 15.
        step: bfloat16 [O, G].
        least: bfloat16 [O, G].
    """

    values: Tensor
    step: Tensor
    least: Tensor

    def dequantise(self) -> Tensor:
        """The weight, float32 [O, I]."""
        grouped = self.values.view(*self.step.shape, GROUP).float()
        return (grouped * self.step.float()[..., None] + self.least.float()[..., None]).flatten(1)


QuantisedWeight: TypeAlias = Int8Weight | Int4Weight


def head_quant(quant: str) -> str:
    """What the output head is rounded to under `quant`."""
    return "int8" if quant == "int4" else quant


def quantise(weight: Tensor, quant: str) -> QuantisedWeight:
    """Round a weight.

    Args:
        weight: [O, I], any floating dtype.
        quant: "int8" or "int4".

    Raises:
        CapabilityError: If it is int4 and the inputs are no multiple of GROUP.
    """
    return _int8(weight.float()) if quant == "int8" else _int4(weight.float())


def _int8(weight: Tensor) -> Int8Weight:
    largest = weight.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return Int8Weight((weight / scale[:, None]).round().to(torch.int8), scale)


def _int4(weight: Tensor) -> Int4Weight:
    outputs, inputs = weight.shape
    if inputs % GROUP:
        raise CapabilityError(
            f"a weight with {inputs} inputs cannot be int4: they must be a multiple of {GROUP}.",
            hint="--quant int8",
        )
    grouped = weight.view(outputs, inputs // GROUP, GROUP)
    fit = _fit_groups(grouped, 1.0)
    # Weights that were stored in four bits before fit at once, and a search would find nothing.
    # Each group is asked by itself: what stands beside it differs between the paths.
    is_open = fit[0] > _KEPT * GROUP * fit[1].float().square()
    if is_open.any():
        tried = [_fit_groups(grouped[is_open], share) for share in _SHRINKS]
        first: _Fit = (fit[0][is_open], fit[1][is_open], fit[2][is_open], fit[3][is_open])
        found: _Fit = functools.reduce(_better_groups, tried, first)
        for part, best in zip(fit, found, strict=True):
            part[is_open] = best
    _, step, least, values = fit
    return Int4Weight(values.flatten(1), step, least)


_Fit: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


def _fit_groups(grouped: Tensor, share: float) -> _Fit:
    """Spread sixteen values over a share of each group's range; squared errors come first."""
    low, high = grouped.aminmax(dim=-1)
    middle, half = (low + high) / 2, (high - low) / 2 * share
    step, least = (half / 7.5).bfloat16(), (middle - half).bfloat16()
    divisor = torch.where(step > 0, step.float(), 1.0)[..., None]
    values = ((grouped - least.float()[..., None]) / divisor).round().clamp_(0, 15)
    error = values * step.float()[..., None] + least.float()[..., None] - grouped
    return error.square().sum(-1), step, least, values.to(torch.uint8)


def _better_groups(old: _Fit, new: _Fit) -> _Fit:
    """Of two fits, the better one in every group."""
    better = new[0] < old[0]

    def pick(i: int) -> Tensor:
        is_wide = old[i].dim() > better.dim()
        return torch.where(better[..., None] if is_wide else better, new[i], old[i])

    return pick(0), pick(1), pick(2), pick(3)


def quantise_modules(model: Any, quant: str) -> None:
    """Round the weights of a stock model's linear layers and experts in place.

    They stay in the model's dtype, so stock modules gain no speed by it. A head that is tied to
    the embedding is parted from it: the embedding is not rounded.

    Args:
        model: A causal LM of transformers.
        quant: "int8" or "int4".

    Raises:
        CapabilityError: If a weight cannot be rounded so.
    """
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    with torch.no_grad():
        for linear in linears:
            wanted = head_quant(quant) if linear is head else quant
            rounded = quantise(linear.weight, wanted).dequantise().to(linear.weight.dtype)
            linear.weight = nn.Parameter(rounded, requires_grad=False)
        for module in model.modules():
            for name in ("gate_up_proj", "down_proj"):
                stacked = getattr(module, name, None)
                if isinstance(stacked, nn.Parameter) and stacked.dim() == 3:  # experts [E, O, I]
                    rows = quantise(stacked.flatten(0, 1), quant).dequantise()
                    rounded = rows.view(stacked.shape).to(stacked.dtype)
                    setattr(module, name, nn.Parameter(rounded, requires_grad=False))
