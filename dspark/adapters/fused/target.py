"""A Target over the fused decoder, as `dspark.adapters.hf.target` is over stock modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.adapters.fused.decoder import FusedDecoder
from dspark.adapters.fused.layout import DecoderParts
from dspark.adapters.fused.library import Library
from dspark.adapters.hf.store import LayerShape, StoreCache
from dspark.cache import Cache
from dspark.errors import CapabilityError
from dspark.target import (
    ExactnessReport,
    HeadRows,
    Largest,
    TargetInfo,
    TargetOutput,
    TokenBatch,
)

__all__ = ["FusedTarget"]


class FusedTarget:
    """Target (dspark.target) that runs a whole forward in one call of the kernels.

    A row's bits never depend on its company here, so exact mode costs nothing and switching it
    changes no computation. K/V are kept in the model's dtype, to which they are rounded anyway.

    Args:
        parts: The model, taken apart.
        library: The kernels.
        info: Facts about the model.
        quant: See `FusedDecoder`.
        lets_go: See `FusedDecoder`.
    """

    def __init__(
        self,
        parts: DecoderParts,
        library: Library,
        info: TargetInfo,
        *,
        quant: str = "none",
        lets_go: bool,
    ) -> None:
        self.decoder = FusedDecoder(parts, library, quant=quant, lets_go=lets_go)
        self._info = info
        self._shapes = [
            LayerShape(layer=layer, heads=parts.kv_heads, head_dim=parts.head_dim)
            for layer in range(info.num_layers)
        ]
        embedding: Tensor = parts.embedding.weight  # type: ignore[assignment]
        head = parts.head
        is_tied = head.weight.data_ptr() == embedding.data_ptr() and quant == "none"
        self._tied = embedding if is_tied else None
        self._head_bias = None if head.bias is None else head.bias.detach().clone()
        self._softcap = parts.logit_softcap or None
        self.exact = True
        self._exactness = ExactnessReport(
            enabled=True,
            holds=False,
            min_rows=1,
            backend=f"fused (weights in {self.decoder.stored})",
            cost=None,
            reason="not probed",
        )

    @property
    def info(self) -> TargetInfo:
        """Facts about the model."""
        return self._info

    @property
    def exactness(self) -> ExactnessReport:
        """What the check at load found."""
        return self._exactness

    def set_exactness(self, report: ExactnessReport) -> None:
        """Record the check's finding."""
        self._exactness = report
        self.switch_exact(report.enabled)

    def switch_exact(self, on: bool) -> None:
        """Note that forwards shall be exact; they are in either case."""
        self.exact = on

    def new_cache(self, *, memory_limit: int | None = None) -> StoreCache:
        """Make an empty cache, in the model's dtype."""
        return StoreCache(
            self._shapes,
            dtype=self.decoder.kept,
            device=torch.device("cpu"),
            memory_limit=memory_limit,
            sum_columns=0,
        )

    def forward(
        self, batch: TokenBatch, cache: Cache, *, capture: Sequence[int] = ()
    ) -> TargetOutput:
        """Run one ragged batch; see `dspark.target.Target.forward`.

        Raises:
            CapabilityError: If the cache was made by another kind of target, a position is past
                the model's longest context, or a layer does not exist.
        """
        if not isinstance(cache, StoreCache) or cache.layout != (self.decoder.kept, 0):
            raise CapabilityError(f"{self._info.name} cannot use a {type(cache).__name__}.")
        last = max(batch.positions.tolist(), default=-1)
        if last >= self._info.max_positions:
            raise CapabilityError(
                f"position {last} is past the longest context of "
                f"{self._info.name}, {self._info.max_positions} tokens."
            )
        for layer in capture:
            if not -1 <= layer <= self._info.num_layers:
                raise CapabilityError(
                    f"layer {layer} cannot be captured: {self._info.name} has layers -1 "
                    f"(embeddings) to {self._info.num_layers - 1}, and {self._info.num_layers} "
                    "for what the output head gets."
                )
        cache.begin(batch)
        logits, kept, best = self.decoder.forward(batch, cache, capture, last + 1)
        largest = None if best is None else Largest(best, logits)
        return TargetOutput(logits, {layer: kept[layer] for layer in capture}, largest)

    @torch.no_grad()
    def embed(self, token_ids: Tensor) -> Tensor:
        """Embed tokens; see `dspark.target.SharesHead.embed`."""
        return self.decoder.embed(token_ids.cpu())

    @torch.no_grad()
    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits of normed hidden states; see `dspark.target.SharesHead.unembed`."""
        return self.decoder.unembed(hidden.cpu())

    @torch.no_grad()
    def head_rows(self, ids: Tensor | None = None) -> HeadRows:
        """Rows of the output head; see `dspark.target.SharesHeadRows.head_rows`."""
        wanted = slice(None) if ids is None else ids.cpu()
        whole = self.decoder.head.unpack() if self._tied is None else self._tied
        bias = None if self._head_bias is None else self._head_bias[wanted]
        return HeadRows(whole[wanted].detach().to(self.decoder.dtype).clone(), bias, self._softcap)
