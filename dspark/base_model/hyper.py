"""Manifold-constrained hyper-connections: N residual streams, mixed by doubly stochastic matrices.

Each half of a block reads a weighted sum of the streams and writes back to all of them; the
stream-to-stream matrix is made doubly stochastic by Sinkhorn iterations. All of it is per token.
Letters: n rows, N streams, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.base_model.config import V4Config
from dspark.base_model.numerics import Numerics, WeightSource

__all__ = ["HyperConnection", "HyperHead", "Mix"]


@dataclass(frozen=True, slots=True)
class Mix:
    """How one half of a block writes back.

    Attributes:
        post: [n, N], weight of the half's output in every stream.
        comb: [n, N, N], weight of old stream j in new stream k at [j, k].
    """

    post: Tensor
    comb: Tensor


class _Projection:
    """The streams of a token, normalised without a weight, times a small matrix."""

    def __init__(
        self, source: WeightSource, prefix: str, config: V4Config, numerics: Numerics
    ) -> None:
        wide = numerics.wide
        self._fn = source.tensor(f"{prefix}_fn").to(wide)
        self.base = source.tensor(f"{prefix}_base").to(wide)
        self.scale = source.tensor(f"{prefix}_scale").to(wide)
        self._eps = config.rms_norm_eps
        self._numerics = numerics

    def __call__(self, streams: Tensor) -> Tensor:
        """[n, N, D] -> [n, rows of fn]."""
        flat = streams.flatten(1).to(self._numerics.wide)
        norm = torch.rsqrt(flat.square().mean(-1, keepdim=True) + self._eps)
        return self._numerics.product(flat, self._fn) * norm


class HyperConnection:
    """Reads and writes the streams around one half of a block.

    Args:
        source: Weights.
        prefix: Name before `_fn`, `_base` and `_scale`.
        config: The model.
        numerics: Shared settings.
    """

    def __init__(
        self, source: WeightSource, prefix: str, config: V4Config, numerics: Numerics
    ) -> None:
        self._project = _Projection(source, prefix, config, numerics)
        self._streams = config.hc_mult
        self._iterations = config.hc_sinkhorn_iters
        self._eps = config.hc_eps
        self._numerics = numerics

    def read(self, streams: Tensor) -> tuple[Tensor, Mix]:
        """Weigh the streams into one input, and say how to write back.

        Args:
            streams: [n, N, D].

        Returns:
            Input [n, D] of the half, and the mix for `write`.
        """
        m, n = self._project(streams), self._streams
        scale, base = self._project.scale, self._project.base
        smooth = self._numerics.smooth
        pre = smooth(torch.sigmoid, m[:, :n] * scale[0] + base[:n]) + self._eps
        post = 2 * smooth(torch.sigmoid, m[:, n : 2 * n] * scale[1] + base[n : 2 * n])
        comb = self._sinkhorn((m[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n)))
        u = (pre[:, :, None] * streams.to(pre.dtype)).sum(1)
        return u.to(self._numerics.dtype), Mix(post, comb)

    def write(self, output: Tensor, streams: Tensor, mix: Mix) -> Tensor:
        """New streams [n, N, D] from a half's output [n, D] and the old streams."""
        old = streams.to(mix.comb.dtype)
        # Element-wise over N instead of a batched product: N is 4, and the order of the sum must
        # not depend on the number of rows. New stream k takes row sums over the FIRST index.
        new = mix.post[:, :, None] * output.to(old.dtype)[:, None]
        for j in range(self._streams):
            new = new + mix.comb[:, j, :, None] * old[:, j, None]
        return new.to(self._numerics.dtype)

    def _sinkhorn(self, logits: Tensor) -> Tensor:
        """Softmax over rows, then normalise columns, then rows and columns in turn."""
        eps = self._eps
        c = logits.softmax(-1) + eps
        c = c / (c.sum(-2, keepdim=True) + eps)
        for _ in range(self._iterations - 1):
            c = c / (c.sum(-1, keepdim=True) + eps)
            c = c / (c.sum(-2, keepdim=True) + eps)
        return c


class HyperHead:
    """Weighs the streams into the final hidden state.

    Args:
        source: Weights.
        prefix: Name before `_fn`, `_base` and `_scale`.
        config: The model.
        numerics: Shared settings.
    """

    def __init__(
        self, source: WeightSource, prefix: str, config: V4Config, numerics: Numerics
    ) -> None:
        self._project = _Projection(source, prefix, config, numerics)
        self._eps = config.hc_eps
        self._numerics = numerics

    def __call__(self, streams: Tensor) -> Tensor:
        """[n, N, D] -> [n, D]."""
        project = self._project
        gate = project(streams) * project.scale + project.base
        w = self._numerics.smooth(torch.sigmoid, gate) + self._eps
        return (w[:, :, None] * streams.to(w.dtype)).sum(1).to(self._numerics.dtype)
