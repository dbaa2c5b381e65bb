"""Partial rotary embedding with interleaved pairs, and YaRN for the layers that compress.

Source: facts of the release, restated: theta of YaRN as in the paper "YaRN: Efficient Context
Window Extension" (Eq. 22-23) without its attention factor. Letters: r rotated dims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.base_model.config import V4Config

__all__ = ["Rotation", "frequencies"]


def frequencies(config: V4Config, *, is_compressed: bool, dtype: torch.dtype) -> Tensor:
    """Rotation per position of every pair of dims.

    Args:
        config: The model.
        is_compressed: For layers that compress (YaRN over `compress_rope_theta`) or for those that
            do not (`rope_theta`, plain).
        dtype: float32, or float64 for a float64 model.

    Returns:
        [r / 2], radians per position.
    """
    r = config.qk_rope_head_dim
    theta = config.compress_rope_theta if is_compressed else config.rope_theta
    base = 1.0 / theta ** (torch.arange(0, r, 2, dtype=dtype) / r)
    if not is_compressed or config.rope_factor == 1:
        return base

    def dim_of(rotations: float) -> float:
        """The dim that turns so many times within the trained length."""
        return (
            r * math.log(config.rope_original / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(dim_of(config.rope_beta_fast)), 0)
    high = min(math.ceil(dim_of(config.rope_beta_slow)), r - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(r // 2, dtype=dtype) - low) / span).clamp(0, 1)
    return base * (1 - ramp) + base / config.rope_factor * ramp


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotation of a set of rows.

    Attributes:
        cos: [n, r / 2].
        sin: [n, r / 2].
    """

    cos: Tensor
    sin: Tensor

    @staticmethod
    def at(positions: Tensor, theta: Tensor) -> Rotation:
        """Rotation at positions int64 [n] with frequencies [r / 2]; angles in theta's dtype."""
        angles = positions.to(theta.dtype)[:, None] * theta
        return Rotation(angles.cos(), angles.sin())

    def apply(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """Rotate the last r dims of every row; pairs are (2i, 2i + 1).

        Args:
            x: [n, d] or [n, H, d].
            inverse: Turn back.
        """
        r = 2 * self.cos.shape[-1]
        cos, sin = self.cos, -self.sin if inverse else self.sin
        if x.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]
        pairs = x[..., -r:].to(cos.dtype).unflatten(-1, (-1, 2))
        even, odd = pairs[..., 0], pairs[..., 1]
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        return torch.cat((x[..., :-r], turned.flatten(-2).to(x.dtype)), dim=-1)
