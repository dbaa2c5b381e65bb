"""Mixture of experts: router, routed experts grouped by expert, one shared expert.

The first layers choose experts by token id from a table, the others by score with a bias that only
selects. Weights come from the scores in both. Routed experts in packed FP4 run in C++ where the
model has the kernels (native_experts.py), everything else in torch.
Letters: n rows, E experts, k chosen, I inner width, P = n k pairs of a row and an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dspark.base_model.config import V4Config
from dspark.base_model.expert_store import ExpertWeights
from dspark.base_model.native_experts import ExpertKernels, KernelStep
from dspark.base_model.numerics import Linear, Numerics, WeightSource
from dspark.base_model.weights import ExpertsOnDevice

__all__ = ["MixtureOfExperts", "RoutedExperts", "Router"]


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


@dataclass(frozen=True, slots=True)
class _Routes:
    """Pairs of a row and an expert, sorted by expert, the rows of an expert in order.

    Attributes:
        rows: int64 [P].
        weights: [P].
        experts: Those that rows were routed to, rising.
        counts: Pairs of each.
    """

    rows: Tensor
    weights: Tensor
    experts: list[int]
    counts: list[int]

    @staticmethod
    def of(chosen: Tensor, weights: Tensor) -> _Routes:
        """Sort what a router returned."""
        experts, order = chosen.flatten().sort(stable=True)
        hit, counts = experts.unique_consecutive(return_counts=True)
        rows = order // chosen.shape[1]
        return _Routes(rows, weights.flatten()[order], hit.tolist(), counts.tolist())


class RoutedExperts:
    """The routed experts of a layer.

    Args:
        prefix: Name before an expert's number.
        config: The model.
        numerics: Shared settings.
        experts: Where their weights are.
    """

    def __init__(
        self, prefix: str, config: V4Config, numerics: Numerics, experts: ExpertsOnDevice
    ) -> None:
        self._prefix = prefix
        self._experts = experts
        self._numerics = numerics
        self._limit = config.swiglu_limit
        self._inner = config.moe_intermediate_size
        self._chosen = config.num_experts_per_tok

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Run rows; only the experts that a row was routed to are touched.

        Args:
            x: [n, D].
            chosen: Experts of each row, int64 [n, k].
            weights: Their weights, [n, k].

        Returns:
            The sum over a row's experts, added in order of their numbers whoever else was routed to
            them, [n, D] in `numerics.wide`.
        """
        out = torch.zeros(x.shape, dtype=self._numerics.wide, device=x.device)
        routes = _Routes.of(chosen, weights)
        kernels = self._numerics.kernels
        if kernels is not None and kernels.can_run(x, self._numerics):
            self._run_kernels(kernels, x, routes, out)
        else:
            for of, first, count in self._each(routes):
                self._add(of, x, routes, first, count, out)
        return out

    def _each(self, routes: _Routes) -> Iterator[tuple[ExpertWeights, int, int]]:
        """Experts in order, each with its first pair and how many it has."""
        first = 0
        fetched = self._experts.each(self._prefix, routes.experts)
        for (_, of), count in zip(fetched, routes.counts, strict=True):
            yield of, first, count
            first += count

    def _add(
        self, of: ExpertWeights, x: Tensor, routes: _Routes, first: int, count: int, out: Tensor
    ) -> None:
        """One expert, in torch."""
        rows = routes.rows[first : first + count]
        weight = routes.weights[first : first + count]
        result = _run_expert(of, x[rows], weight, self._limit, self._numerics)
        out.index_add_(0, rows, result.to(out.dtype))

    def _run_kernels(self, kernels: ExpertKernels, x: Tensor, routes: _Routes, out: Tensor) -> None:
        """In groups of as many experts as one row has: any store holds so many at a time."""
        step = KernelStep(
            kernels,
            x,
            routes.rows,
            routes.weights,
            inner=self._inner,
            limit=self._limit,
            numerics=self._numerics,
        )
        group: list[tuple[ExpertWeights, int, int]] = []
        for of, first, count in self._each(routes):
            can_read = kernels.can_read(of, x.shape[1], self._inner)
            if can_read:
                group.append((of, first, count))
            if group and (len(group) == self._chosen or not can_read):
                step.add(group, out)
                group = []
            if not can_read:
                self._add(of, x, routes, first, count, out)
        if group:
            step.add(group, out)


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
        self._routed = RoutedExperts(f"{prefix}.experts", config, numerics, experts)
        shared = f"{prefix}.shared_experts"
        self._shared = ExpertWeights(
            w1=source.stored(f"{shared}.w1"),
            w2=source.stored(f"{shared}.w2"),
            w3=source.stored(f"{shared}.w3"),
        )
        self._limit = config.swiglu_limit
        self._numerics = numerics

    def __call__(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """[n, D] -> [n, D]."""
        chosen, weights = self._router(x, token_ids)
        if self.on_route is not None:
            self.on_route(chosen)
        out = self._routed(x, chosen, weights)
        shared = _run_expert(self._shared, x, None, self._limit, self._numerics)
        return (out + shared.to(out.dtype)).to(x.dtype)


def _run_expert(
    of: ExpertWeights, x: Tensor, weight: Tensor | None, limit: float, numerics: Numerics
) -> Tensor:
    """One expert on its rows, each with its weight if there is one: clamped SwiGLU, in torch."""
    gate = Linear(of.w1, numerics)(x).to(numerics.wide)
    up = Linear(of.w3, numerics)(x).to(numerics.wide)
    if limit > 0:
        gate = gate.clamp(max=limit)
        up = up.clamp(-limit, limit)
    inner = numerics.smooth(F.silu, gate) * up
    if weight is not None:
        inner = inner * weight[:, None]
    return Linear(of.w2, numerics)(inner.to(numerics.dtype))
