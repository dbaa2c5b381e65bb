"""The V4 decoder: embedding, streams, blocks, final head, over flattened ragged batches.

Letters: n rows, M rows whose logits are wanted, N streams, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dspark.base_model.attention import Rotations
from dspark.base_model.block import Block
from dspark.base_model.cache import V4Cache
from dspark.base_model.config import V4Config
from dspark.base_model.expert_store import ExpertStore
from dspark.base_model.hyper import HyperHead
from dspark.base_model.numerics import Linear, Numerics, WeightSource, rms_norm
from dspark.base_model.rotary import frequencies
from dspark.base_model.step import plan_step
from dspark.base_model.weights import ExpertsOnDevice, OnDevice
from dspark.target import TargetOutput, TokenBatch

__all__ = ["STREAMS", "V4Model"]

STREAMS = "streams"
"""Key under which `V4Model.forward` hands out the last block's streams."""


class V4Model:
    """DeepSeek-V4 on plain PyTorch.

    Args:
        config: The model.
        source: Weights by official name.
        experts: Where the routed experts' weights are.
        dtype: Dtype of activations and of the cache.
        devices: Where layers live: they are split over these in order, in parts of equal size.
        fake_quant: Round activations as the release's kernels do.
    """

    def __init__(
        self,
        config: V4Config,
        source: WeightSource,
        experts: ExpertStore,
        *,
        dtype: torch.dtype,
        devices: Sequence[torch.device] = (torch.device("cpu"),),
        fake_quant: bool = False,
    ) -> None:
        self.config = config
        self.source = source
        self.experts = experts
        self.numerics = Numerics.of(dtype, devices[0])
        self.numerics.fake_quant = fake_quant
        layers = config.num_hidden_layers
        self.devices = [devices[i * len(devices) // layers] for i in range(layers)]
        first, last = OnDevice(source, self.devices[0]), OnDevice(source, self.devices[-1])
        self.blocks = [
            Block(
                OnDevice(source, device),
                f"layers.{layer}",
                config,
                self.numerics,
                layer,
                ExpertsOnDevice(experts, device),
            )
            for layer, device in enumerate(self.devices)
        ]
        self._embedding = first.tensor("embed.weight")
        self._head = Linear(last.stored("head"), self.numerics, is_wide=True)
        self._norm = last.tensor("norm.weight").to(self.numerics.wide)
        self._collapse = HyperHead(last, "hc_head", config, self.numerics)
        self._theta = tuple(
            frequencies(config, is_compressed=kind, dtype=self.numerics.wide)
            for kind in (False, True)
        )

    @contextmanager
    def keeping(self, entries: int) -> Iterator[None]:
        """Have every indexer keep so many entries, for a check."""
        indexers = [block.attention.indexer for block in self.blocks]
        found = [indexer for indexer in indexers if indexer is not None]
        before = [indexer.count for indexer in found]
        try:
            for indexer in found:
                indexer.count = min(entries, indexer.count)
            yield
        finally:
            for indexer, count in zip(found, before, strict=True):
                indexer.count = count

    def new_cache(self, memory_limit: int | None = None) -> V4Cache:
        """An empty cache."""
        return V4Cache(
            self.config,
            devices=dict(enumerate(self.devices)),
            dtype=self.numerics.dtype,
            wide=self.numerics.wide,
            memory_limit=memory_limit,
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings [n, D] of token ids int64 [n]."""
        return self._embedding[token_ids.to(self._embedding.device)].to(self.numerics.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [M, V] of normed hidden states [M, D]."""
        return self._head(hidden)

    @torch.inference_mode()
    def forward(
        self, batch: TokenBatch, cache: V4Cache, *, capture: Sequence[int] = ()
    ) -> TargetOutput:
        """Run a batch; see `dspark.target.Target.forward`.

        `capture` names layers, -1 for the embeddings: the mean over the streams behind that layer,
        [n, D]; or `num_hidden_layers`: all streams behind the last layer, [n, N * D].
        """
        cache.begin(batch)
        steps = {d: plan_step(batch, cache, d) for d in dict.fromkeys(self.devices)}
        rotations = {
            device: Rotations(step, (self._theta[0].to(device), self._theta[1].to(device)))
            for device, step in steps.items()
        }
        embedded = self.embed(torch.from_numpy(batch.token_ids))
        streams = embedded[:, None].repeat(1, self.config.hc_mult, 1)
        captured = {-1: embedded} if -1 in capture else {}
        for layer, (block, device) in enumerate(zip(self.blocks, self.devices, strict=True)):
            streams = block(streams.to(device), steps[device], rotations[device], cache)
            if layer in capture:
                captured[layer] = streams.mean(1, dtype=self.numerics.wide).to(streams.dtype)
        if self.config.num_hidden_layers in capture:
            captured[self.config.num_hidden_layers] = streams.flatten(1)
        rows = torch.from_numpy(batch.output_rows).to(streams.device)
        return TargetOutput(self._logits(streams[rows]), captured)

    def _logits(self, streams: Tensor) -> Tensor:
        hidden = self._collapse(streams)
        wide = self.numerics.wide
        return self.head(rms_norm(hidden, self._norm, self.config.rms_norm_eps, wide))
