"""Lightning indexer: which compressed entries a token attends to in a CSA layer.

score(p, s) = sum over heads of w_h * ReLU(q_h . K_s); the `index_topk` best are attended to by all
heads alike. Source: DeepSeek-V4 report, section on compressed sparse attention. Letters: n rows,
h heads, d head size, E entries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dspark.base_model.compressor import Compressor
from dspark.base_model.config import CSA_RATIO, V4Config
from dspark.base_model.numerics import Linear, Numerics, WeightSource, stable_top
from dspark.base_model.pool import ZERO_ROW
from dspark.base_model.quantsim import round_index
from dspark.base_model.rotary import Rotation
from dspark.base_model.step import LaneStep, SlotEntries

__all__ = ["Indexer"]

_EXACT_COLUMNS = 64
"""In exact mode keys come in multiples of this: the last columns of a product may be summed in
another order than the rest."""

_SCORE_BYTES = 64 * 2**20
"""Scores of all heads are made for as many rows at once as fit in this."""


class Indexer:
    """Scores and selects entries.

    Args:
        source: Weights.
        prefix: Name before `.wq_b`.
        config: The model.
        numerics: Shared settings.

    Attributes:
        count: Entries kept for a row at the most.
    """

    def __init__(
        self, source: WeightSource, prefix: str, config: V4Config, numerics: Numerics
    ) -> None:
        self._query = Linear(source.stored(f"{prefix}.wq_b"), numerics)
        self._weights = Linear(source.stored(f"{prefix}.weights_proj"), numerics)
        self.compressor = Compressor(
            source,
            f"{prefix}.compressor",
            config,
            numerics,
            ratio=CSA_RATIO,
            is_overlapping=True,
        )
        self._heads, self._dim = config.index_n_heads, config.index_head_dim
        self.count = config.index_topk
        self._numerics = numerics

    def select(
        self, x: Tensor, latent: Tensor, rotation: Rotation, keys: Tensor, step: LaneStep
    ) -> tuple[Tensor, Tensor]:
        """Choose entries for every row.

        Args:
            x: [n, D], normed.
            latent: [n, q_lora_rank], the attention's normed query latent.
            rotation: At the rows' positions.
            keys: Indexer keys in the pool, [rows, d].
            step: What the layer's rows see.

        Returns:
            Entry rows int64 [n, K] by index, ZERO_ROW behind the last, and how many each row
            chose, int64 [n].
        """
        most = max((len(of.rows) for of in step.slots), default=0)
        if most <= self.count:
            chosen = [_visible(of) for of in step.slots]
        else:
            query = self._query(latent).unflatten(-1, (self._heads, self._dim))
            query = rotation.apply(query)
            if self._numerics.fake_quant:
                query = round_index(query)
            scale = (self._dim * self._heads) ** -0.5
            weights = self._weights(x).to(self._numerics.wide) * scale
            chosen = [
                stable_top(
                    self._scores(
                        query[of.start : of.stop], weights[of.start : of.stop], keys, of
                    ).masked_fill(~_visible(of), -torch.inf),
                    self.count,
                )
                for of in step.slots
            ]
        return _rows_of(chosen, step.slots)

    def _scores(self, query: Tensor, weights: Tensor, keys: Tensor, of: SlotEntries) -> Tensor:
        """[n, E] scores of one slot's rows against all its entries."""
        wide = self._numerics.wide
        run = of.run
        parts = [keys[of.rows[: of.committed]] if run is None else keys[run]]
        if len(of.rows) > of.committed:
            parts.append(keys[of.rows[of.committed :]])
        table = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(wide)
        if self._numerics.exact:
            table = F.pad(table, (0, 0, 0, -len(of.rows) % _EXACT_COLUMNS))
        size = max(1, table.shape[0]) * self._heads * table.element_size()
        step = 1 if self._numerics.exact else max(1, _SCORE_BYTES // size)
        scores = []
        for a in range(0, query.shape[0], step):
            part = query[a : a + step].to(wide)
            hits = (part.flatten(0, 1) @ table.T).relu_().unflatten(0, part.shape[:2])
            weight = weights[a : a + step]
            if self._numerics.exact:  # a sum over heads in one order, whatever the rows
                scores.append((hits * weight[:, :, None]).sum(1))
            else:
                scores.append(torch.bmm(weight[:, None], hits)[:, 0])
        return torch.cat(scores)[:, : len(of.rows)]


def _visible(of: SlotEntries) -> Tensor:
    """Mark all committed entries and those of a row's own path: bool [n, E]."""
    committed = of.owned.new_ones(of.owned.shape[0], of.committed)
    return torch.cat((committed, of.owned), dim=1)


def _rows_of(chosen: list[Tensor], slots: tuple[SlotEntries, ...]) -> tuple[Tensor, Tensor]:
    """Pool rows [n, K] of what each row chose, in order."""
    counts = torch.cat([mask.sum(-1) for mask in chosen])
    width = int(counts.max()) if counts.numel() else 0
    out = counts.new_full((len(counts), width), ZERO_ROW)
    for mask, of in zip(chosen, slots, strict=True):
        row, column = mask.nonzero(as_tuple=True)
        place = mask.cumsum(-1)[row, column] - 1
        out[of.start + row, place] = of.rows[column]
    return out, counts
