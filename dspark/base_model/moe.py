"""Mixture of experts: router, routed experts grouped by expert, one shared expert.

The first layers choose experts by token id from a table, the others by score with a bias that only
selects. Weights come from the scores in both. Letters: n rows, E experts, k chosen, I inner width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dspark.base_model.config import V4Config
from dspark.base_model.expert_store import ExpertWeights
from dspark.base_model.numerics import Linear, Numerics, WeightSource
from dspark.base_model.weights import ExpertsOnDevice

__all__ = ["MixtureOfExperts", "Router"]


class Router:
    """Chooses experts and their weights.

    Args:
        source: Weights.
        prefix: Name before `.weight`.
        config: The model.
        numerics: Shared settings.
        layer: Its number; the first `num_hash_layers` choose by token id.
    """

    def __init__(
        self, source: WeightSource, prefix: str, config: V4Config, numerics: Numerics, layer: int
    ) -> None:
        self._score = Linear(source.stored(prefix), numerics, is_wide=True)
        self._table: Tensor | None = None
        self._bias: Tensor | None = None
        if config.is_hash_layer(layer):
            self._table = source.tensor(f"{prefix}.tid2eid").long()
        else:
            self._bias = source.tensor(f"{prefix}.bias").to(numerics.wide)
        self._numerics = numerics
        self._count = config.num_experts_per_tok
        self._factor = config.routed_scaling_factor

    def __call__(self, x: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Route rows.

        Args:
            x: [n, D], normed.
            token_ids: int64 [n].

        Returns:
            Experts int64 [n, k] and their weights [n, k].
        """
        scores = self._numerics.smooth(F.softplus, self._score(x)).sqrt()
        if self._table is not None:
            chosen = self._table[token_ids]
        else:
            # A stable order: ties go to the lowest index, as in any other run of the same row.
            biased = scores if self._bias is None else scores + self._bias
            chosen = biased.sort(dim=-1, descending=True, stable=True).indices[:, : self._count]
        weights = scores.gather(1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) * self._factor


class MixtureOfExperts:
    """The second half of a block.

    Args:
        source: Weights.
        prefix: Name before `.gate`.
        config: The model.
        numerics: Shared settings.
        layer: Its number.
        experts: Where the routed experts' weights are.

    Attributes:
        on_route: Called with the experts chosen for rows, [n, k], if it is set.
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
        self.on_route: Callable[[Tensor], None] | None = None
        self._router = Router(source, f"{prefix}.gate", config, numerics, layer)
        self._experts = experts
        self._prefix = f"{prefix}.experts"
        shared = f"{prefix}.shared_experts"
        self._shared = ExpertWeights(
            w1=source.stored(f"{shared}.w1"),
            w2=source.stored(f"{shared}.w2"),
            w3=source.stored(f"{shared}.w3"),
        )
        self._limit = config.swiglu_limit
        self._numerics = numerics

    def __call__(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """[n, D] -> [n, D]; only the experts that a row was routed to are touched."""
        chosen, weights = self._router(x, token_ids)
        if self.on_route is not None:
            self.on_route(chosen)
        out = torch.zeros(x.shape, dtype=self._numerics.wide, device=x.device)
        hit = torch.unique(chosen).tolist()
        for expert, of in self._experts.each(self._prefix, hit):
            rows, place = torch.where(chosen == expert)
            result = self._run(of, x[rows], weights[rows, place])
            # Added in order of the experts' numbers, whoever else was routed to them.
            out.index_add_(0, rows, result.to(out.dtype))
        return (out + self._run(self._shared, x, None).to(out.dtype)).to(x.dtype)

    def _run(self, of: ExpertWeights, x: Tensor, weight: Tensor | None) -> Tensor:
        """One expert on its rows, each with its weight: clamped SwiGLU."""
        numerics = self._numerics
        gate = Linear(of.w1, numerics)(x).to(numerics.wide)
        up = Linear(of.w3, numerics)(x).to(numerics.wide)
        if self._limit > 0:
            gate = gate.clamp(max=self._limit)
            up = up.clamp(-self._limit, self._limit)
        inner = numerics.smooth(F.silu, gate) * up
        if weight is not None:
            inner = inner * weight[:, None]
        return Linear(of.w2, numerics)(inner.to(numerics.dtype))
