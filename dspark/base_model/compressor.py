"""Compressors: one entry per window of m positions, pooled by a learned gate per channel.

HCA pools the m positions of a window. CSA windows overlap: a token has one value and gate for its
own window and one for the next, and an entry pools the previous window's "next" halves and its own
window's "own" halves. Source: DeepSeek-V4 report, Eq. 9-12 and 20-23 (go by channel halves: the
report's letters and the released code's disagree). Letters: n rows, C entries, d channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark.base_model.config import V4Config
from dspark.base_model.numerics import Linear, Numerics, WeightSource, rms_norm
from dspark.base_model.rotary import Rotation

__all__ = ["Compressor"]


class Compressor:
    """Projects tokens to raw rows and pools raw rows into entries.

    Args:
        source: Weights.
        prefix: Name before `.wkv`.
        config: The model.
        numerics: Shared settings.
        ratio: m.
        is_overlapping: CSA's scheme, in which an entry pools 2m rows.
    """

    def __init__(
        self,
        source: WeightSource,
        prefix: str,
        config: V4Config,
        numerics: Numerics,
        *,
        ratio: int,
        is_overlapping: bool,
    ) -> None:
        self._value = Linear(source.stored(f"{prefix}.wkv"), numerics, is_wide=True)
        self._gate = Linear(source.stored(f"{prefix}.wgate"), numerics, is_wide=True)
        self._bias = source.tensor(f"{prefix}.ape").to(numerics.wide)
        self._norm = source.tensor(f"{prefix}.norm.weight").to(numerics.wide)
        self._eps = config.rms_norm_eps
        self._ratio = ratio
        self._is_overlapping = is_overlapping
        self._numerics = numerics

    def project(self, x: Tensor) -> Tensor:
        """Raw rows of tokens: values, then gates without their bias.

        Args:
            x: [n, D], normed.

        Returns:
            [n, 2d], or [n, 4d] where windows overlap, in `numerics.wide`.
        """
        return torch.cat((self._value(x), self._gate(x)), dim=-1)

    def pool(self, raw: Tensor, present: Tensor, rotation: Rotation) -> Tensor:
        """Pool raw rows into entries.

        Args:
            raw: [C, R, 2d] with R = m, or [C, R, 4d] with R = 2m where windows overlap, by
                position.
            present: bool [C, R], False for rows before the text began.
            rotation: At every entry's first position, m * index.

        Returns:
            [C, d] in `numerics.dtype`.
        """
        value, gate = raw.chunk(2, dim=-1)
        if self._is_overlapping:
            # A row's first half is for the window after its own.
            m, d = self._ratio, value.shape[-1] // 2
            gate = gate + torch.cat((self._bias, self._bias))
            value = torch.cat((value[:, :m, :d], value[:, m:, d:]), dim=1)
            gate = torch.cat((gate[:, :m, :d], gate[:, m:, d:]), dim=1)
        else:
            gate = gate + self._bias
        weight = gate.masked_fill(~present[:, :, None], -torch.inf).softmax(dim=1)
        entry = (weight * value).sum(1).to(self._numerics.dtype)
        return rotation.apply(rms_norm(entry, self._norm, self._eps, self._numerics.wide))
