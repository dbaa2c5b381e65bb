"""A weight matrix as a checkpoint stores it: packed FP4, FP8 in blocks, or plain floats.

Letters: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dspark.base_model.fp4 import GROUP, decode_fp4
from dspark.base_model.fp8 import BLOCK, decode_e4m3, decode_e8m0, scale_columns
from dspark.errors import CheckpointError, ShapeError

__all__ = ["StoredWeight", "WeightKind"]

WeightKind = Literal["fp4", "fp8", "float"]
_PACKED = (torch.int8, torch.uint8, torch.float4_e2m1fn_x2)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCALES = (torch.float8_e8m0fnu, torch.float32)
_CHUNK = 1 << 19  # numbers decoded at a time: what is between the passes stays in the cache


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A matrix [O, I] and its scales. `StoredWeight.of` checks what it is given; this does not.

    Attributes:
        weight: Float or float8_e4m3fn [O, I], or packed FP4 (int8, uint8, float4_e2m1fn_x2)
            [O, I / 2], two a byte, low nibble first.
        scale: None for floats; [ceil(O / 128), ceil(I / 128)] for FP8; [O, I / 32] for FP4;
            float8_e8m0fnu or float32.
    """

    weight: Tensor
    scale: Tensor | None = None

    @classmethod
    def of(cls, name: str, weight: Tensor, scale: Tensor | None = None) -> StoredWeight:
        """Check shapes and dtypes, and wrap them.

        Args:
            name: What errors call it, such as "layers.0.attn.wq_a".
            weight: The matrix.
            scale: Its scales, or None.

        Raises:
            CheckpointError: If the dtypes are not ours or the shapes do not belong together.
        """
        if scale is not None and scale.dtype == torch.uint8:
            scale = scale.view(torch.float8_e8m0fnu)  # how MXFP formats tag the same bytes
        wrapped = cls(weight, scale)
        problem = _problem(wrapped)
        if problem:
            raise CheckpointError(f"{name} {problem}.")
        return wrapped

    @property
    def kind(self) -> WeightKind:
        """What the matrix is stored as."""
        if self.weight.dtype in _PACKED:
            return "fp4"
        return "fp8" if self.weight.dtype == torch.float8_e4m3fn else "float"

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self.weight.shape
        return rows, columns * 2 if self.kind == "fp4" else columns

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix and its scales."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def dequantise(
        self,
        dtype: torch.dtype,
        start: int = 0,
        stop: int | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Rows start to stop - 1 as numbers, each rounded once.

        Args:
            dtype: float32, bfloat16, float64 or float16.
            start: First row; any, not only a multiple of 128.
            stop: Row after the last; None for O.
            out: Contiguous [stop - start, I] in `dtype` to write to. A buffer that is used again
                saves more than half of the time of float32 (its pages are there already).

        Returns:
            [stop - start, I] in `dtype`: `out` if it was given; a view for floats stored in
            `dtype`.

        Raises:
            ShapeError: If the rows are not in 0..O, or `out` does not fit them.
        """
        rows, columns = self.shape
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise ShapeError(f"rows {start} to {stop} were asked of a weight of {rows} rows.")
        if self.kind == "float":
            part = self.weight[start:stop]
            return part.to(dtype) if out is None else out.copy_(part)
        if out is None:
            out = torch.empty(stop - start, columns, dtype=dtype, device=self.weight.device)
        elif out.shape != (stop - start, columns) or out.dtype != dtype or not out.is_contiguous():
            raise ShapeError(
                f"out is {out.dtype} {list(out.shape)}, but must be contiguous {dtype} "
                f"{[stop - start, columns]}."
            )
        step = max(1, _CHUNK // max(columns, 1))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            self._decode(out[first - start : last - start], first, last)
        return out

    def _decode(self, out: Tensor, start: int, stop: int) -> None:
        """Write rows start to stop - 1 to `out`, via float32 unless that rounds no differently."""
        scale = self._row_scales(start, stop)
        raw = self.weight[start:stop]
        # A code times a power of two is rounded once in bfloat16, too; times a float32 it is not.
        is_direct = out.dtype == torch.float32 or (
            out.dtype == torch.bfloat16 and scale.dtype == torch.float8_e8m0fnu
        )
        target = out if is_direct else torch.empty(out.shape, device=out.device)
        if self.kind == "fp4":
            decode_fp4(raw, target)
        else:
            decode_e4m3(raw, target)
        if out.dtype == torch.float64:
            target = out.copy_(target)
        group = GROUP if self.kind == "fp4" else BLOCK
        scale_columns(target, decode_e8m0(scale, target.dtype), group)
        if target is not out:
            out.copy_(target)

    def _row_scales(self, start: int, stop: int) -> Tensor:
        """The scales of each row: [stop - start, groups]."""
        if self.scale is None:
            raise CheckpointError(f"a weight stored as {self.weight.dtype} has no scales.")
        if self.kind == "fp4":
            return self.scale[start:stop]
        row = torch.arange(start, stop, device=self.scale.device) // BLOCK
        raw = self.scale.view(torch.uint8) if self.scale.element_size() == 1 else self.scale
        return raw[row].view(self.scale.dtype)


def _problem(stored: StoredWeight) -> str | None:
    """What is wrong with a weight and its scales, as the rest of a sentence."""
    weight, scale = stored.weight, stored.scale
    if weight.dtype not in (*_PACKED, *_FLOATS, torch.float8_e4m3fn):
        return f"is stored as {_name(weight)}, but must be float, float8_e4m3fn or packed FP4 int8"
    if weight.dim() != 2:
        return f"has shape {list(weight.shape)}, but a weight has two dimensions"
    if stored.kind == "float":
        if scale is not None:
            return f"is stored as {_name(weight)}, which takes no scale, but has one"
        return None
    if scale is None:
        return f"is stored as {_name(weight)}, which needs a scale, but has none"
    if scale.dtype not in _SCALES:
        return f"has a scale of {_name(scale)}, but it must be float8_e8m0fnu or float32"
    rows, columns = stored.shape
    if stored.kind == "fp4" and columns % GROUP:
        return f"has {columns} FP4 columns, but they must be a multiple of {GROUP}"
    wanted = (
        [rows, columns // GROUP]
        if stored.kind == "fp4"
        else [-(-rows // BLOCK), -(-columns // BLOCK)]
    )
    if list(scale.shape) != wanted:
        return f"of shape {[rows, columns]} has a scale of {list(scale.shape)}, but needs {wanted}"
    return None


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
