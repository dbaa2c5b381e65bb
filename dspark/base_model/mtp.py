"""The MTP-1 module of V4's preview checkpoints (`mtp.0`), run recursively.

At index t it joins the target's streams X_t with the token x_{t+1} and predicts x_{t+2}; in later
steps its own output streams take the place of X_t. Source: DeepSeek-V4 report, multi-token
prediction; DeepSeek-V3, arXiv 2412.19437, Eq. 21-23.

Letters: n rows, N streams, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark.base_model.attention import Rotations
from dspark.base_model.block import Block
from dspark.base_model.cache import V4Cache
from dspark.base_model.hyper import HyperHead
from dspark.base_model.model import V4Model
from dspark.base_model.numerics import Linear, Numerics, rms_norm
from dspark.base_model.rotary import frequencies
from dspark.base_model.step import plan_step
from dspark.base_model.weights import ExpertsOnDevice, OnDevice
from dspark.target import TokenBatch

__all__ = ["MTPModule"]


class MTPModule:
    """One V4 block over joined streams and tokens.

    Args:
        model: The target; its embedding, head and weights are used.
    """

    def __init__(self, model: V4Model) -> None:
        config, device = model.config, model.devices[-1]
        source = OnDevice(model.source, device)
        # A draft never decides about the text, so exact mode would only slow it down.
        self._numerics = numerics = Numerics.of(model.numerics.dtype, device)
        self._model, self._config, self._layer = model, config, config.num_hidden_layers
        self.device = device
        self._block = Block(
            source,
            "mtp.0",
            config,
            numerics,
            self._layer,
            ExpertsOnDevice(model.experts, device),
        )
        wide = numerics.wide
        self._token_norm = source.tensor("mtp.0.enorm.weight").to(wide)
        self._stream_norm = source.tensor("mtp.0.hnorm.weight").to(wide)
        self._norm = source.tensor("mtp.0.norm.weight").to(wide)
        self._from_token = Linear(source.stored("mtp.0.e_proj"), numerics)
        self._from_streams = Linear(source.stored("mtp.0.h_proj"), numerics)
        self._collapse = HyperHead(source, "mtp.0.hc_head", config, numerics)
        plain = frequencies(config, is_compressed=False, dtype=wide).to(device)
        self._theta = (plain, plain)

    def new_cache(self) -> V4Cache:
        """An empty cache of the module's own keys."""
        return V4Cache(
            self._config,
            devices={self._layer: self.device},
            dtype=self._numerics.dtype,
            wide=self._numerics.wide,
        )

    @torch.inference_mode()
    def forward(self, batch: TokenBatch, streams: Tensor, cache: V4Cache) -> Tensor:
        """Run joined rows; they stay uncommitted in the cache.

        Args:
            batch: The rows; `token_ids` are the tokens x_{t+1}.
            streams: [n, N, D], the streams X_t they are joined with.
            cache: From `new_cache`.

        Returns:
            Output streams [n, N, D].
        """
        cache.begin(batch)
        step = plan_step(batch, cache, self.device)
        eps, wide = self._config.rms_norm_eps, self._numerics.wide
        rows, count = streams.to(self.device, self._numerics.dtype), streams.shape[1]
        embedded = self._model.embed(torch.from_numpy(batch.token_ids)).to(self.device)
        token = self._from_token(rms_norm(embedded, self._token_norm, eps, wide))
        normed = rms_norm(rows, self._stream_norm, eps, wide)
        joined = self._from_streams(normed.flatten(0, 1)).view(-1, count, normed.shape[-1])
        return self._block(joined + token[:, None], step, Rotations(step, self._theta), cache)

    @torch.inference_mode()
    def logits(self, streams: Tensor) -> Tensor:
        """Logits [n, V] of output streams [n, N, D]."""
        hidden = self._collapse(streams)
        wide = self._numerics.wide
        return self._model.head(rms_norm(hidden, self._norm, self._config.rms_norm_eps, wide))

    def split(self, flat: Tensor) -> Tensor:
        """Captured streams [n, N * D] as [n, N, D]."""
        return flat.view(-1, self._config.hc_mult, self._config.hidden_size)
