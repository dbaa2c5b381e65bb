"""A linear layer on packed weights, in place of a stock one where nothing is differentiated."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from dspark.adapters.fused import structures
from dspark.adapters.fused.library import Library
from dspark.adapters.fused.packing import PackedMatrix, pack_stacked
from dspark.adapters.quantise import GROUP
from dspark.errors import ShapeError

__all__ = ["PackedLinear", "can_pack"]

_DTYPES = (torch.float32, torch.bfloat16)


def can_pack(linear: nn.Linear, quant: str) -> bool:
    """True if the kernels can run a layer: its device, dtype and number of inputs are theirs.

    Args:
        linear: The layer.
        quant: "none", "int8" or "int4".
    """
    weight = linear.weight
    multiple = 2 if quant == "none" else GROUP
    is_theirs = weight.device.type == "cpu" and weight.dtype in _DTYPES
    return is_theirs and weight.numel() > 0 and linear.in_features % multiple == 0


class PackedLinear(nn.Module):
    """A linear layer whose product is the fused decoder's: a row's bits depend on it alone.

    Outputs are in the layer's dtype, rounded to it once. Calls may run at the same time. There are
    no gradients.

    Args:
        linear: The layer; not changed, and not kept.
        library: The kernels.
        quant: What to round the weight to: "none", "int8" or "int4".

    Attributes:
        in_features: I.
        out_features: O.
        weight: No numbers, but the dtype and device that the layer computes in.
        kind: How the weight is stored (packing.KINDS).
    """

    def __init__(self, linear: nn.Linear, library: Library, quant: str) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        empty = torch.empty(0, dtype=linear.weight.dtype)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self._packed = pack_stacked([linear], library.lanes, quant)
        self._matrix = structures.matrix(self._packed)
        self._address = ctypes.addressof(self._matrix)
        self._run = library.linear
        self._is_rounded = int(linear.weight.dtype == torch.bfloat16)

    @property
    def packed(self) -> PackedMatrix:
        """The weight as the kernels read it."""
        return self._packed

    @property
    def kind(self) -> str:
        """How the weight is stored."""
        return self._packed.kind

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] in any layout -> [..., O], in the layer's dtype.

        Raises:
            ShapeError: If the last dimension is not I.
        """
        if x.shape[-1] != self.in_features:
            raise ShapeError(
                f"rows have {x.shape[-1]} numbers, but the layer takes {self.in_features}."
            )
        dtype = self.weight.dtype
        rows = x.detach().to(dtype).to(torch.float32).contiguous()
        count = rows.numel() // self.in_features
        out = torch.empty(*x.shape[:-1], self.out_features)
        if count:
            threads = torch.get_num_threads()
            self._run(
                self._address, rows.data_ptr(), count, out.data_ptr(), self._is_rounded, threads
            )
        return out.to(dtype)
