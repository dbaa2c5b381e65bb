"""FP8 e4m3 in blocks of 128 x 128 with power-of-two scales, as DeepSeek-V4 stores its linears.

An e8m0 byte b is 2^(b - 127), 255 is NaN. A scale is 2^ceil(log2(amax / 448)), and is found from
the bits of amax, since a logarithm in floating point may land on the wrong side of a power of two.
Letters: O rows (outputs), I columns (inputs).

Source: `inference/kernel.py` of the DeepSeek-V4 release (act_quant, fast_round_scale).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dspark.errors import CheckpointError, ShapeError

__all__ = [
    "BLOCK",
    "E4M3_MAX",
    "act_quant",
    "as_words",
    "check_finite",
    "decode_e4m3",
    "decode_e8m0",
    "look_up",
    "quantise_fp8",
    "scale_bytes",
    "scale_columns",
]

BLOCK = 128
"""Rows and columns that share an FP8 scale."""
E4M3_MAX = 448.0
_E4M3_TOP = (8, 0x600000)  # 448 = 2^8 * 1.75: the exponent, and .75 as bits of a float32 mantissa
_LEAST_BYTE = 1  # 2^-126; the release's floor, under which a float32 is subnormal
_LEAST_AMAX = 1e-4  # of an activation


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix to e4m3, one scale per block of 128 x 128.

    Args:
        weight: Float [O, I], any O and I.

    Returns:
        float8_e4m3fn [O, I] and float8_e8m0fnu [ceil(O / 128), ceil(I / 128)].

    Raises:
        CheckpointError: If a weight is infinite or not a number.
    """
    rows, columns = weight.shape
    values = weight.float()
    check_finite(values)
    pad = (0, -columns % BLOCK, 0, -rows % BLOCK)
    padded = torch.nn.functional.pad(values, pad) if any(pad) else values
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scale = scale_bytes(blocks.abs().amax(dim=(1, 3)), _E4M3_TOP)
    codes = blocks / decode_e8m0(scale)[:, None, :, None]
    codes = codes.clamp_(-E4M3_MAX, E4M3_MAX).view(padded.shape)[:rows, :columns]
    return codes.contiguous().to(torch.float8_e4m3fn), scale


def act_quant(x: Tensor, group: int = BLOCK) -> Tensor:
    """Round activations to what e4m3 with a power-of-two scale per group holds.

    Args:
        x: Float [..., K].
        group: Neighbours in the last dimension that share a scale; divides K.

    Returns:
        [..., K] in the dtype of `x`.

    Raises:
        ShapeError: If `group` does not divide K.
    """
    groups = split_groups(x, group)
    amax = groups.abs().amax(dim=-1, keepdim=True).clamp_min(_LEAST_AMAX)
    scale = decode_e8m0(scale_bytes(amax, _E4M3_TOP))
    codes = (groups / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.float().mul_(scale).view(x.shape).to(x.dtype)


def split_groups(x: Tensor, group: int) -> Tensor:
    """View [..., K] as float32 [..., K / group, group].

    Raises:
        ShapeError: If `group` does not divide K.
    """
    if group < 1 or x.shape[-1] % group:
        raise ShapeError(
            f"the last dimension is {x.shape[-1]}, but must be a multiple of the group {group}."
        )
    return x.float().reshape(*x.shape[:-1], -1, group)


def scale_bytes(amax: Tensor, top: tuple[int, int]) -> Tensor:
    """The least power of two s for which amax / s does not exceed a format's largest number.

    Args:
        amax: float32, not negative, finite.
        top: That number as (exponent, float32 mantissa bits).

    Returns:
        float8_e8m0fnu of the shape of `amax`, at least 2^-126 (so of zeros, too).
    """
    exponent, mantissa = top
    bits = amax.contiguous().view(torch.int32)
    byte = (bits >> 23) - exponent + ((bits & 0x7FFFFF) > mantissa).int()
    return byte.clamp_(_LEAST_BYTE, 254).to(torch.uint8).view(torch.float8_e8m0fnu)


def check_finite(values: Tensor) -> None:
    """Refuse what no scale can hold.

    Raises:
        CheckpointError: If a value is infinite or not a number.
    """
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError("a weight is infinite or not a number, but must be finite.")


def decode_e8m0(scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The powers of two of e8m0 bytes; float32 or float64 scales are cast.

    Args:
        scale: float8_e8m0fnu, or a float tensor.
        dtype: float32, bfloat16 or float64; each holds every power exactly.
    """
    if scale.dtype != torch.float8_e8m0fnu:
        return scale.to(dtype)
    index = scale.contiguous().view(torch.uint8).flatten().int()
    return torch.index_select(_e8m0_table(dtype, scale.device), 0, index).view(scale.shape)


def decode_e4m3(codes: Tensor, out: Tensor) -> None:
    """Write the numbers of e4m3 codes; NaN stays NaN.

    Args:
        codes: float8_e4m3fn [R, I].
        out: float32 or bfloat16 [R, I], contiguous.
    """
    # Two codes an index: torch's own cast takes codes one at a time, and is five times slower.
    table = _e4m3_table(out.dtype, out.device)
    words = as_words(codes)
    if words is None:
        # Entry b of the table, under 256, holds the numbers of b and of 0.
        one = table.view(out.dtype)[0:512:2].contiguous()
        look_up(one, codes.contiguous().view(torch.uint8), out)
    else:
        look_up(table, words, out)


def as_words(codes: Tensor) -> Tensor | None:
    """View bytes [R, K] as uint16 [R, K / 2], or None if K is odd."""
    if codes.shape[1] % 2:
        return None
    if not codes.is_contiguous() or codes.storage_offset() % 2:
        codes = codes.clone(memory_format=torch.contiguous_format)
    return codes.view(torch.uint8).view(torch.uint16)


def look_up(table: Tensor, index: Tensor, out: Tensor) -> None:
    """Write the table entries of an index to `out`, as words that hold several numbers.

    Args:
        table: One entry per value of the index; its items are as wide as an entry.
        index: uint8 or uint16 [R, K].
        out: Contiguous, R * K entries.
    """
    words = out.view(table.dtype) if table.dtype != out.dtype else out
    torch.index_select(table, 0, index.flatten().int(), out=words.view(-1))


def scale_columns(values: Tensor, scale: Tensor, group: int) -> None:
    """Multiply groups of columns by their scales, in place.

    Args:
        values: [R, I].
        scale: [R, ceil(I / group)], or [1, ...] for all rows alike, in the dtype of `values`.
        group: Columns that share a scale; the last group may be shorter.
    """
    whole = values.shape[1] // group
    if whole:
        columns = values[:, : whole * group].view(values.shape[0], whole, group)
        columns.mul_(scale[:, :whole, None])
    if values.shape[1] % group:
        values[:, whole * group :].mul_(scale[:, whole:])


@functools.cache
def _e8m0_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    bits = torch.arange(256, dtype=torch.int32, device=device) << 23
    bits[0] = 0x400000  # 2^-127 is subnormal
    bits[255] = 0x7FC00000  # NaN; the shift would make it infinity
    return bits.view(torch.float32).to(dtype)


@functools.cache
def _e4m3_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of every two bytes their two numbers as one word, the low byte first."""
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    one = codes.float().to(dtype)
    pair = torch.arange(65536, device=device)
    numbers = torch.stack([one[pair & 255], one[pair >> 8]], dim=1)
    return numbers.view(torch.int64 if dtype == torch.float32 else torch.int32).view(-1)
