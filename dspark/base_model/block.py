"""One V4 block: attention and experts, each wrapped in hyper-connections."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dspark.base_model.attention import Attention, Rotations
from dspark.base_model.cache import V4Cache
from dspark.base_model.config import V4Config
from dspark.base_model.hyper import HyperConnection
from dspark.base_model.moe import MixtureOfExperts
from dspark.base_model.numerics import Numerics, WeightSource, rms_norm
from dspark.base_model.step import Step
from dspark.base_model.weights import ExpertsOnDevice

__all__ = ["Block"]


class Block:
    """A decoder layer, or a stage of a draft module.

    Args:
        source: Weights.
        prefix: "layers.3" or "mtp.0".
        config: The model.
        numerics: Shared settings.
        layer: Its number; draft stages count on behind the decoder layers.
        experts: Where the routed experts' weights are.
    """

    def __init__(
        self,
        source: WeightSource,
        prefix: str,
        config: V4Config,
        numerics: Numerics,
        layer: int,
        experts: ExpertsOnDevice,
    ) -> None:
        wide = numerics.wide
        self.attention = Attention(source, f"{prefix}.attn", config, numerics, layer)
        self.experts = MixtureOfExperts(source, f"{prefix}.ffn", config, numerics, layer, experts)
        self._attention_streams = HyperConnection(source, f"{prefix}.hc_attn", config, numerics)
        self._expert_streams = HyperConnection(source, f"{prefix}.hc_ffn", config, numerics)
        self._attention_norm = source.tensor(f"{prefix}.attn_norm.weight").to(wide)
        self._expert_norm = source.tensor(f"{prefix}.ffn_norm.weight").to(wide)
        self._eps, self._wide = config.rms_norm_eps, wide

    def __call__(self, streams: Tensor, step: Step, rotations: Rotations, cache: V4Cache) -> Tensor:
        """Streams [n, N, D] of a forward through the block."""
        return self.run(
            streams, step.token_ids, lambda x: self.attention(x, step, rotations, cache)
        )

    def run(self, streams: Tensor, token_ids: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """The block around an attention of the caller's.

        Args:
            streams: [n, N, D].
            token_ids: int64 [n].
            attend: Normed rows [n, D] to attention output [n, D].

        Returns:
            [n, N, D].
        """
        u, mix = self._attention_streams.read(streams)
        y = attend(rms_norm(u, self._attention_norm, self._eps, self._wide))
        streams = self._attention_streams.write(y, streams, mix)
        u, mix = self._expert_streams.read(streams)
        y = self.experts(rms_norm(u, self._expert_norm, self._eps, self._wide), token_ids)
        return self._expert_streams.write(y, streams, mix)
