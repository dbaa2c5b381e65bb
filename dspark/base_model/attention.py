"""V4 attention: one key that is also the value, a window, compressed entries, a sink per head.

Every row gathers the rows it sees (step.py), so a decode step, a prefill chunk and a tree are the
same computation, a matrix of H queries against the row's own keys. Keys are summed over in blocks
that start at fixed places of the row's own list; what is behind a row's last key adds exact zeros.
Letters: n rows, H heads, c head size, B keys of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dspark.base_model.cache import V4Cache
from dspark.base_model.compressor import Compressor
from dspark.base_model.config import LayerKind, V4Config
from dspark.base_model.indexer import Indexer
from dspark.base_model.numerics import Linear, Numerics, WeightSource, rms_norm
from dspark.base_model.quantsim import round_index, round_rows
from dspark.base_model.rotary import Rotation
from dspark.base_model.step import LaneStep, Step

__all__ = ["Attention", "Rotations", "attend"]

_BLOCK = 256
"""Keys that are summed over at once."""

_GATHER_BYTES = 64 * 2**20
"""Keys are gathered for as many rows at once as fit in this."""


class Rotations:
    """Rotations of a forward, worked out once for all layers of a kind.

    Args:
        step: The forward.
        theta: Frequencies [r / 2] of layers without compression, and of those with it.
    """

    def __init__(self, step: Step, theta: tuple[Tensor, Tensor]) -> None:
        self.rows = {
            is_compressed: Rotation.at(step.positions, theta[is_compressed])
            for is_compressed in (False, True)
        }
        self.entries = {
            ratio: Rotation.at(lane.index * ratio, theta[1]) for ratio, lane in step.lanes.items()
        }


class Attention:
    """Attention of one layer.

    Args:
        source: Weights.
        prefix: Name before `.wq_a`.
        config: The model.
        numerics: Shared settings.
        layer: Its number.
    """

    def __init__(
        self, source: WeightSource, prefix: str, config: V4Config, numerics: Numerics, layer: int
    ) -> None:
        wide = numerics.wide
        self._query_down = Linear(source.stored(f"{prefix}.wq_a"), numerics)
        self._query_up = Linear(source.stored(f"{prefix}.wq_b"), numerics)
        self._keys = Linear(source.stored(f"{prefix}.wkv"), numerics)
        self._out_down = source.stored(f"{prefix}.wo_a")
        self._out_up = Linear(source.stored(f"{prefix}.wo_b"), numerics)
        self._query_norm = source.tensor(f"{prefix}.q_norm.weight").to(wide)
        self._key_norm = source.tensor(f"{prefix}.kv_norm.weight").to(wide)
        self._sink = source.tensor(f"{prefix}.attn_sink").to(wide)
        self._config, self._numerics, self._layer = config, numerics, layer
        self.kind = config.layer_kind(layer)
        self.ratio = config.ratio(layer)
        self.compressor: Compressor | None = None
        self.indexer: Indexer | None = None
        if self.kind is not LayerKind.SLIDING:
            self.compressor = Compressor(
                source,
                f"{prefix}.compressor",
                config,
                numerics,
                ratio=self.ratio,
                is_overlapping=self.kind is LayerKind.CSA,
            )
        if self.kind is LayerKind.CSA:
            self.indexer = Indexer(source, f"{prefix}.indexer", config, numerics)

    def __call__(self, x: Tensor, step: Step, rotations: Rotations, cache: V4Cache) -> Tensor:
        """Attend; the rows' keys and entries go to their staging rows of the cache.

        Args:
            x: [n, D], normed.
            step: What the rows read and write.
            rotations: Rotations of the forward.
            cache: The cache.

        Returns:
            [n, D].
        """
        rotation = rotations.rows[self.kind is not LayerKind.SLIDING]
        latent, query = self.queries(x, rotation)
        window = cache.window.layer(self._layer, "row")
        window[step.stage] = self.keys(x, rotation)
        parts = [(window, step.window, step.in_window)]
        if self.compressor is not None:
            lane = step.lanes[self.ratio]
            self._write_entries(x, lane, rotations.entries[self.ratio], cache)
            rows, counts = self._visible(x, latent, rotation, lane, cache)
            if rows.shape[1]:
                seen = torch.arange(rows.shape[1], device=rows.device) < counts[:, None]
                entries = cache.lanes[self.ratio].entries.layer(self._layer, "entry")
                parts.append((entries, rows, seen))
        return self.output(attend(query, parts, self._sink, self._numerics), rotation)

    def queries(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """The query latent [n, q_lora_rank] and rotated queries [n, H, c] of rows [n, D]."""
        config, wide = self._config, self._numerics.wide
        latent = rms_norm(self._query_down(x), self._query_norm, config.rms_norm_eps, wide)
        query = self._query_up(latent).unflatten(-1, (-1, config.head_dim))
        return latent, rotation.apply(rms_norm(query, None, config.rms_norm_eps, wide))

    def keys(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Rotated keys, which are the values too, [n, c], of rows [n, D]."""
        config = self._config
        keys = rms_norm(self._keys(x), self._key_norm, config.rms_norm_eps, self._numerics.wide)
        keys = rotation.apply(keys)
        if self._numerics.fake_quant:
            keys = round_rows(keys, config.qk_rope_head_dim)
        return keys

    def output(self, heads: Tensor, rotation: Rotation) -> Tensor:
        """Turn the heads' outputs [n, H, c] back and project them to [n, D], group by group."""
        numerics, config = self._numerics, self._config
        grouped = rotation.apply(heads, inverse=True).flatten(1).chunk(config.o_groups, dim=-1)
        rank, compute = config.o_lora_rank, numerics.compute
        parts = [
            numerics.product(
                part.to(compute),
                numerics.numbers(self._out_down, compute, g * rank, (g + 1) * rank),
            )
            for g, part in enumerate(grouped)
        ]
        return self._out_up(torch.cat(parts, dim=-1).to(numerics.dtype))

    @property
    def sink(self) -> Tensor:
        """The sink of every head, [H]."""
        return self._sink

    def _write_entries(self, x: Tensor, lane: LaneStep, rotation: Rotation, cache: V4Cache) -> None:
        """Stage the rows' raw rows, and the entries of the windows they close."""
        pools = cache.lanes[self.ratio]
        compressors = {"entry": self.compressor}
        if self.indexer is not None:
            compressors["key"] = self.indexer.compressor
        for part, compressor in compressors.items():
            if compressor is None:
                continue
            raw = pools.raw.layer(self._layer, part)
            raw[lane.raw] = compressor.project(x)
            if len(lane.closing) == 0:
                continue
            entry = compressor.pool(raw[lane.pooled], lane.present, rotation)
            if self._numerics.fake_quant:
                rotated = self._config.qk_rope_head_dim
                entry = round_rows(entry, rotated) if part == "entry" else round_index(entry)
            pools.entries.layer(self._layer, part)[lane.staged] = entry

    def _visible(
        self, x: Tensor, latent: Tensor, rotation: Rotation, lane: LaneStep, cache: V4Cache
    ) -> tuple[Tensor, Tensor]:
        """Entry rows [n, K] and how many of them each row attends to, [n]."""
        if self.indexer is None:
            return lane.entries, lane.seen
        keys = cache.lanes[self.ratio].entries.layer(self._layer, "key")
        return self.indexer.select(x, latent, rotation, keys, lane)


def attend(
    query: Tensor,
    parts: list[tuple[Tensor, Tensor, Tensor]],
    sink: Tensor,
    numerics: Numerics,
) -> Tensor:
    """Softmax over gathered keys and a sink; the keys are the values.

    Args:
        query: [n, H, c].
        parts: (pool [rows, c], rows int64 [n, K], mask bool [n, K]) of every kind of key.
        sink: [H]; takes part in the softmax, has no value.
        numerics: Shared settings.

    Returns:
        [n, H, c] in the dtype of `query`.
    """
    blocks = [
        (pool, rows[:, a : a + _BLOCK], mask[:, a : a + _BLOCK])
        for pool, rows, mask in parts
        for a in range(0, rows.shape[1], _BLOCK)
    ]
    if numerics.exact:
        blocks = [_filled(*block) for block in blocks]
    keys = sum(rows.shape[1] for _, rows, _ in blocks)
    step = max(1, _GATHER_BYTES // (keys * query.shape[-1] * numerics.wide.itemsize))
    out = [
        _attend_rows(
            query[a : a + step].to(numerics.wide),
            [(pool, rows[a : a + step], mask[a : a + step]) for pool, rows, mask in blocks],
            sink,
            numerics,
        )
        for a in range(0, query.shape[0], step)
    ]
    return torch.cat(out).to(query.dtype)


def _filled(pool: Tensor, rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A block of full width, so that every product has one shape whoever else is in the batch."""
    missing = -rows.shape[1] % 64 if rows.shape[1] < _BLOCK else 0
    return pool, F.pad(rows, (0, missing)), F.pad(mask, (0, missing), value=False)


def _attend_rows(
    query: Tensor,
    blocks: list[tuple[Tensor, Tensor, Tensor]],
    sink: Tensor,
    numerics: Numerics,
) -> Tensor:
    scale = query.shape[-1] ** -0.5
    gathered, scores = [], []
    for pool, rows, mask in blocks:
        keys = pool[rows].to(query.dtype)  # [n, B, c]
        gathered.append(keys)
        score = torch.bmm(query, keys.transpose(1, 2)) * scale
        scores.append(score.masked_fill(~mask[:, None], -torch.inf))
    top = sink[None, :, None].expand(query.shape[0], -1, 1)
    for score in scores:
        top = torch.maximum(top, score.amax(-1, keepdim=True))
    total = numerics.smooth(torch.exp, sink[None, :, None] - top)
    out = torch.zeros_like(query)
    for keys, score in zip(gathered, scores, strict=True):
        weight = numerics.smooth(torch.exp, score - top)
        total = total + weight.sum(-1, keepdim=True)
        out = out + torch.bmm(weight, keys)
    return out / total
