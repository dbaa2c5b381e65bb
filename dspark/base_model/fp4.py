"""Packed FP4 e2m1 in groups of 32 columns with power-of-two scales: the routed experts' format.

A byte holds two neighbours of a row, the first in its low nibble. Codes 0 to 7 are 0, 0.5, 1, 1.5,
2, 3, 4, 6; codes 8 to 15 their negatives. A scale is 2^ceil(log2(amax / 6)).
Letters: O rows (outputs), I columns (inputs).

Source: `inference/kernel.py` and `convert.py` of the DeepSeek-V4 release.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dspark.base_model.fp8 import (
    BLOCK,
    as_words,
    check_finite,
    decode_e8m0,
    look_up,
    scale_bytes,
    scale_columns,
    split_groups,
)
from dspark.errors import CheckpointError, ShapeError

__all__ = [
    "GROUP",
    "decode_fp4",
    "fp4_act_quant",
    "pack_codes",
    "quantise_fp4",
    "recast_fp4_to_fp8",
    "unpack_codes",
]

GROUP = 32
"""Columns that share an FP4 scale."""
_E2M1_TOP = (2, 0x400000)  # 6 = 2^2 * 1.5: the exponent, and .5 as bits of a float32 mantissa
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CHUNK = 1 << 17  # numbers encoded at a time: what is between the passes stays in the cache
_HEADROOM = 6  # powers of two between the largest FP4 and FP8 scale of a block: 6 * 2^6 < 448


def quantise_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix to packed e2m1, one scale per 32 columns of a row.

    Args:
        weight: Float [O, I]; 32 divides I.

    Returns:
        int8 [O, I / 2] and float8_e8m0fnu [O, I / 32].

    Raises:
        ShapeError: If 32 does not divide I.
        CheckpointError: If a weight is infinite or not a number.
    """
    step = max(1, _CHUNK // max(weight.shape[1], 1))
    parts = [_quantise_rows(rows) for rows in weight.split(step)]
    packed, scales = torch.cat([p for p, _ in parts]), torch.cat([s for _, s in parts])
    return packed, scales.view(torch.float8_e8m0fnu)


def _quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes and scale bytes of a few rows."""
    groups = split_groups(weight, GROUP)
    check_finite(groups)
    scale = scale_bytes(groups.abs().amax(dim=-1), _E2M1_TOP)
    codes = _encode(groups / decode_e8m0(scale)[..., None])
    return pack_codes(codes.view(weight.shape)), scale.view(torch.uint8)


def fp4_act_quant(x: Tensor, group: int = GROUP) -> Tensor:
    """Round activations to what e2m1 with a power-of-two scale per group holds.

    Args:
        x: Float [..., K].
        group: Neighbours in the last dimension that share a scale; divides K.

    Returns:
        [..., K] in the dtype of `x`.

    Raises:
        ShapeError: If `group` does not divide K.
    """
    groups = split_groups(x, group)
    scale = decode_e8m0(scale_bytes(groups.abs().amax(dim=-1, keepdim=True), _E2M1_TOP))
    codes = _encode(groups / scale).int()
    values = _numbers(torch.float32, x.device)[codes]
    return values.mul_(scale).view(x.shape).to(x.dtype)


def recast_fp4_to_fp8(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Store FP4 weights as FP8 blocks that hold exactly the same numbers.

    Args:
        packed: int8 or uint8 [O, I / 2].
        scale: float8_e8m0fnu [O, I / 32].

    Returns:
        float8_e4m3fn [O, I] and float8_e8m0fnu [ceil(O / 128), ceil(I / 128)].

    Raises:
        CheckpointError: If the scales inside a block are too far apart for e4m3, or one is NaN.

    Source: `convert.py` of the DeepSeek-V4 release: block scale = largest scale / 2^6.
    """
    step = BLOCK * max(1, _CHUNK // (BLOCK * max(2 * packed.shape[1], 1)))
    raw = scale.view(torch.uint8)
    pairs = zip(packed.view(torch.uint8).split(step), raw.split(step), strict=True)
    parts = [_recast_rows(*pair) for pair in pairs]
    weight, scales = torch.cat([w for w, _ in parts]), torch.cat([s for _, s in parts])
    return weight.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)


def _recast_rows(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 codes and scale bytes of some rows of blocks."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    numbers = torch.empty(rows, columns, device=packed.device)
    decode_fp4(packed, numbers)
    bytes_ = scale.int()
    if bool((bytes_ == 255).any()):
        raise CheckpointError("a scale is not a number, so the weights have no FP8 form.")
    # A group of zeros says nothing about the size of its block.
    is_used = (numbers.view(rows, -1, GROUP) != 0).any(dim=-1)
    used = torch.where(is_used, bytes_, 0)
    per_block = BLOCK // GROUP
    padding = (0, -used.shape[1] % per_block, 0, -rows % BLOCK)
    padded = torch.nn.functional.pad(used, padding)
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, per_block)
    block_bytes = (blocks.amax(dim=(1, 3)) - _HEADROOM).clamp_min_(0)
    spread = block_bytes.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(per_block, 1)
    exponent = torch.where(is_used, bytes_ - spread[:, : used.shape[1]], 0)
    scale_columns(numbers, torch.exp2(exponent.float()), GROUP)
    recast = numbers.to(torch.float8_e4m3fn)
    if not torch.equal(recast.float(), numbers):
        least = int(exponent.min()) - _HEADROOM
        raise CheckpointError(
            f"FP4 scales inside a block differ by 2^{-least}, but e4m3 holds at most 2^14 exactly."
        )
    return recast.view(torch.uint8), block_bytes.to(torch.uint8)


def decode_fp4(packed: Tensor, out: Tensor) -> None:
    """Write the numbers of packed codes, without scales.

    Args:
        packed: Bytes [R, I / 2].
        out: float32 or bfloat16 [R, I], contiguous.
    """
    # bfloat16: four codes an index fill a 64-bit word; float32: two do.
    words = as_words(packed) if out.dtype == torch.bfloat16 else None
    table = _table(out.dtype, out.device, 2 if words is None else 4)
    look_up(table, packed.contiguous().view(torch.uint8) if words is None else words, out)


def pack_codes(codes: Tensor) -> Tensor:
    """Pack codes of 0 to 15, uint8 [O, I], two a byte, low nibble first: int8 [O, I / 2]."""
    if codes.shape[-1] % 2:
        raise ShapeError(f"a row has {codes.shape[-1]} FP4 codes, but must have an even number.")
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).view(torch.int8)


def unpack_codes(packed: Tensor) -> Tensor:
    """Unpack bytes [O, I / 2] to codes of 0 to 15, uint8 [O, I]."""
    raw = packed.view(torch.uint8)
    return torch.stack([raw & 15, raw >> 4], dim=-1).flatten(-2)


def _encode(values: Tensor) -> Tensor:
    """The nearest code, halfway to the even one; larger numbers than 6 go to 6."""
    size = values.abs()
    code = (size > 0.25).to(torch.uint8)
    for limit, next_is_even in ((0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
        code += size >= limit if next_is_even else size > limit
    return code | (torch.signbit(values).to(torch.uint8) << 3)


@functools.cache
def _numbers(dtype: torch.dtype, device: torch.device) -> Tensor:
    positive = torch.tensor(_NUMBERS, dtype=dtype, device=device)
    return torch.cat([positive, -positive])


@functools.cache
def _table(dtype: torch.dtype, device: torch.device, codes: int) -> Tensor:
    """Of every word of 2 or 4 codes their numbers as one 64-bit or narrower word."""
    one = _numbers(dtype, device)
    index = torch.arange(16**codes, device=device)
    numbers = torch.stack([one[(index >> (4 * i)) & 15] for i in range(codes)], dim=1)
    width = codes * dtype.itemsize
    return numbers.view(torch.int64 if width == 8 else torch.int32).view(-1)
