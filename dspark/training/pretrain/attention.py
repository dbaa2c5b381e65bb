"""V4's attention over whole sequences, with gradients; parameters carry the official names.

What the model computes is what `dspark.base_model` computes (tests compare the two): no cache, all
positions at once, every sequence from position 0. Letters: B sequences, S tokens, n = B * S rows,
D hidden, H heads, c head size, W window, m compression rate, C = S div m entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.base_model.config import CSA_RATIO, LayerKind, V4Config
from dspark.base_model.numerics import stable_top
from dspark.base_model.rotary import frequencies
from dspark.training.pretrain.ops import attend, turn

__all__ = ["Attention", "Notes", "RMSNorm", "Shape", "rms_norm", "turns_at"]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Scale x to weight * x / sqrt(mean(x^2) + eps) over the last dim."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def turns_at(positions: Tensor, theta: Tensor) -> Tensor:
    """Turns of positions int64 [n] at frequencies [r / 2]: complex [n, r / 2], of length 1."""
    angles = positions.to(theta.dtype)[:, None] * theta
    return torch.complex(angles.cos(), angles.sin())


class RMSNorm(nn.Module):
    """An RMS norm with a weight.

    Args:
        size: Of the last dim.
        eps: Added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm of rows [..., size]."""
        return rms_norm(x, self.weight, self._eps)


class Shape:
    """What depends on the lengths alone: rotations and masks, for B sequences of S tokens.

    Args:
        config: The model.
        batch: B.
        length: S.
        dtype: Of rotations and masks.
    """

    def __init__(
        self, config: V4Config, batch: int, length: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.batch, self.length, self.dtype = batch, length, dtype
        self.window = config.sliding_window
        self.blocks = -(-length // self.window)
        self._theta = [
            frequencies(config, is_compressed=kind, dtype=dtype) for kind in (False, True)
        ]
        positions = torch.arange(length).repeat(batch)
        self._rows = [turns_at(positions, theta) for theta in self._theta]
        self._near = self._window_bias()

    def turns(self, *, is_compressed: bool) -> Tensor:
        """Turns of all rows, sequence by sequence: complex [n, r / 2]."""
        return self._rows[is_compressed]

    def entry_turns(self, ratio: int) -> Tensor:
        """Turns of all entries, sequence by sequence; an entry stands at its first position."""
        first = torch.arange(self.length // ratio) * ratio
        return turns_at(first.repeat(self.batch), self._theta[1])

    def visible(self, ratio: int) -> Tensor:
        """Which entries a position sees: bool [S, C]."""
        seen = (torch.arange(self.length) + 1) // ratio
        return torch.arange(self.length // ratio) < seen[:, None]

    def blocked(self, rows: Tensor) -> Tensor:
        """Rows [B * S, ...] in blocks, zeros behind the last: [B * blocks, W, ...]."""
        parts = rows.unflatten(0, (self.batch, self.length))
        missing = self.blocks * self.window - self.length
        if missing:
            parts = F.pad(parts, (0, 0) * (rows.dim() - 1) + (0, missing))
        out: Tensor = parts.reshape(self.batch * self.blocks, self.window, *rows.shape[1:])
        return out

    def unblocked(self, blocks: Tensor) -> Tensor:
        """The opposite of `blocked`."""
        parts = blocks.reshape(self.batch, self.blocks * self.window, *blocks.shape[2:])
        return parts[:, : self.length].flatten(0, 1)

    def near_keys(self, keys: Tensor) -> Tensor:
        """Keys [B * S, c] that a block's rows can see: its own and those before, [.., 2W, c]."""
        own = self.blocked(keys).unflatten(0, (self.batch, self.blocks))
        before = F.pad(own, (0, 0, 0, 0, 1, 0))[:, :-1]
        return torch.cat((before, own), dim=2).flatten(0, 1)

    def bias(self, entries: Tensor | None) -> Tensor:
        """Bias of attention for `near_keys` and entries behind them.

        Args:
            entries: Which entries a row sees, bool [S, C] or [B, S, C]; None without.

        Returns:
            [blocks, W, 2W + C] or [B * blocks, W, 2W + C], 0 or -inf.
        """
        if entries is None:
            return self._near
        batch = entries.shape[0] if entries.dim() == 3 else 1
        far = torch.zeros(entries.shape, dtype=self.dtype).masked_fill_(~entries, -torch.inf)
        far = far.reshape(batch, self.length, -1)
        far = F.pad(far, (0, 0, 0, self.blocks * self.window - self.length))
        far = far.reshape(batch * self.blocks, self.window, -1)
        return torch.cat((self._near.repeat(batch, 1, 1), far), dim=-1)

    def _window_bias(self) -> Tensor:
        w = self.window
        row, column = torch.arange(w)[:, None], torch.arange(2 * w)
        seen = (column > row) & (column <= row + w)
        first = seen & (column >= w)  # nothing is before the first block
        blocks = torch.stack([first] + [seen] * (self.blocks - 1))
        return torch.zeros(blocks.shape, dtype=self.dtype).masked_fill_(~blocks, -torch.inf)


@dataclass(slots=True)
class Notes:
    """What a forward leaves behind beside its output.

    Attributes:
        indexer: "off", "learn" or "select"; see `settings.Stage`.
        balance: Balance losses of the layers.
        index: Losses of the indexers.
        loads: Score-routed routers, each with the rows of its experts.
    """

    indexer: str = "off"
    balance: list[Tensor] = field(default_factory=list)
    index: list[Tensor] = field(default_factory=list)
    loads: list[tuple[nn.Module, list[int]]] = field(default_factory=list)


class Compressor(nn.Module):
    """Pools windows of m positions into entries.

    Args:
        config: The model.
        size: Channels of an entry.
        ratio: m.
    """

    def __init__(self, config: V4Config, size: int, ratio: int) -> None:
        super().__init__()
        self.ratio, self.size = ratio, size
        self._is_overlapping = ratio == CSA_RATIO
        width = size * (2 if self._is_overlapping else 1)
        self.wkv = nn.Linear(config.hidden_size, width, bias=False)
        self.wgate = nn.Linear(config.hidden_size, width, bias=False)
        self.ape = nn.Parameter(torch.zeros(ratio, width))
        self.norm = RMSNorm(size, config.rms_norm_eps)

    def forward(self, x: Tensor, shape: Shape) -> Tensor:
        """Entries [B, C, c] of rows [n, D]."""
        count = shape.length // self.ratio
        rows = x.unflatten(0, (shape.batch, shape.length))[:, : count * self.ratio]
        value = self.wkv(rows).unflatten(1, (count, self.ratio))
        gate = self.wgate(rows).unflatten(1, (count, self.ratio)) + self.ape
        if self._is_overlapping:
            value, gate = self._overlap(value, 0.0), self._overlap(gate, -torch.inf)
        entry = (gate.softmax(2) * value).sum(2).flatten(0, 1)
        turned = turn(self.norm(entry), shape.entry_turns(self.ratio))
        out: Tensor = turned.unflatten(0, (shape.batch, count))
        return out

    def _overlap(self, rows: Tensor, absent: float) -> Tensor:
        """[B, C, m, 2d] as [B, C, 2m, d]: the window before gives its first halves."""
        ahead, own = rows.split(self.size, dim=-1)
        before = F.pad(ahead, (0, 0, 0, 0, 1, 0), value=absent)[:, :-1]
        return torch.cat((before, own), dim=2)


class Indexer(nn.Module):
    """Scores entries, and learns to score as attention weighs them.

    Its inputs are detached: its loss reaches its own weights only. **Source:** lightning indexer,
    DeepSeek-V3.2 report: the divergence of its softmax from the attention's shares, summed over
    heads and normalised; over all visible entries first, then over the selected ones.

    Args:
        config: The model.
    """

    def __init__(self, config: V4Config) -> None:
        super().__init__()
        self._heads, self._size = config.index_n_heads, config.index_head_dim
        self._count = config.index_topk
        self.wq_b = nn.Linear(config.q_lora_rank, self._heads * self._size, bias=False)
        self.weights_proj = nn.Linear(config.hidden_size, self._heads, bias=False)
        self.compressor = Compressor(config, self._size, CSA_RATIO)

    def scores(self, x: Tensor, latent: Tensor, shape: Shape) -> Tensor:
        """Scores [B, S, C] of rows [n, D] with query latents [n, q_lora_rank]."""
        x, latent = x.detach(), latent.detach()
        query = self.wq_b(latent).unflatten(-1, (self._heads, self._size))
        query = turn(query, shape.turns(is_compressed=True))
        keys = self.compressor(x, shape)
        query = query.reshape(shape.batch, -1, self._size)
        hits = torch.bmm(query, keys.transpose(1, 2)).relu()
        hits = hits.view(shape.batch, shape.length, self._heads, -1)
        weights = self.weights_proj(x) * (self._heads * self._size) ** -0.5
        return torch.einsum("bsh,bshc->bsc", weights.view(shape.batch, -1, self._heads), hits)

    def select(self, scores: Tensor, visible: Tensor) -> Tensor:
        """Which entries a row attends to: bool [B, S, C]."""
        masked = scores.detach().masked_fill(~visible, -torch.inf)
        return stable_top(masked.flatten(0, 1), self._count).view(scores.shape)

    @staticmethod
    def loss(scores: Tensor, seen: Tensor, shares: Tensor) -> Tensor:
        """Divergence from the attention's shares, the mean over rows that see an entry.

        Args:
            scores: [B, S, C].
            seen: bool [B, S, C] or [S, C], entries that were attended to.
            shares: [B, S, C], summed over heads.
        """
        total = shares.sum(-1, keepdim=True)
        law = shares / total.clamp_min(1e-20)
        own = scores.masked_fill(~seen, -torch.inf).log_softmax(-1).masked_fill(~seen, 0.0)
        rows = (law * (law.clamp_min(1e-30).log() - own)).sum(-1)
        has_any = (seen.any(-1) & (total[..., 0] > 0)).float()
        return (rows * has_any).sum() / has_any.sum().clamp_min(1)


class Attention(nn.Module):
    """Attention of one layer.

    Args:
        config: The model.
        layer: Its number; draft stages count on behind the decoder layers.
    """

    def __init__(self, config: V4Config, layer: int) -> None:
        super().__init__()
        self._config = config
        self.kind, self.ratio = config.layer_kind(layer), config.ratio(layer)
        hidden, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
        groups, rank, eps = config.o_groups, config.o_lora_rank, config.rms_norm_eps
        self.attn_sink = nn.Parameter(torch.zeros(heads))
        self.wq_a = nn.Linear(hidden, config.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(config.q_lora_rank, eps)
        self.wq_b = nn.Linear(config.q_lora_rank, heads * size, bias=False)
        self.wkv = nn.Linear(hidden, size, bias=False)
        self.kv_norm = RMSNorm(size, eps)
        self.wo_a = nn.Linear(heads * size // groups, groups * rank, bias=False)
        self.wo_b = nn.Linear(groups * rank, hidden, bias=False)
        if self.kind is not LayerKind.SLIDING:
            self.compressor = Compressor(config, size, self.ratio)
        if self.kind is LayerKind.CSA:
            self.indexer = Indexer(config)

    def forward(self, x: Tensor, shape: Shape, notes: Notes) -> Tensor:
        """Attention output [n, D] of normed rows [n, D]."""
        turns = shape.turns(is_compressed=self.kind is not LayerKind.SLIDING)
        latent, query = self.queries(x, turns)
        keys = shape.near_keys(self.keys(x, turns))
        near, seen, scores = keys.shape[1], None, None
        if self.kind is not LayerKind.SLIDING:
            entries = self.compressor(x, shape)
            seen = shape.visible(self.ratio)
            if self.kind is LayerKind.CSA and notes.indexer != "off":
                scores = self.indexer.scores(x, latent, shape)
                seen = self.indexer.select(scores, seen) if notes.indexer == "select" else seen
            keys = torch.cat((keys, entries.repeat_interleave(shape.blocks, 0)), dim=1)
        out, law = attend(shape.blocked(query), keys, self.attn_sink, shape.bias(seen))
        if self.training and scores is not None and seen is not None:
            shares = shape.unblocked(law[..., near:].sum(2)).view(scores.shape)
            notes.index.append(self.indexer.loss(scores, seen, shares))
        return self.output(shape.unblocked(out), turns)

    def queries(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """Query latents [n, q_lora_rank] and rotated queries [n, H, c]."""
        latent = self.q_norm(self.wq_a(x))
        query = self.wq_b(latent).unflatten(-1, (-1, self._config.head_dim))
        return latent, turn(rms_norm(query, None, self._config.rms_norm_eps), turns)

    def keys(self, x: Tensor, turns: Tensor) -> Tensor:
        """Rotated keys, which are the values too, [n, c]."""
        return turn(self.kv_norm(self.wkv(x)), turns)

    def output(self, heads: Tensor, turns: Tensor) -> Tensor:
        """Turn the heads' outputs [n, H, c] back and project them, group by group: [n, D]."""
        groups = self._config.o_groups
        turned = turn(heads, turns.conj()).flatten(1)
        parts = turned.unflatten(-1, (groups, -1)).transpose(0, 1)
        low = torch.bmm(parts, self.wo_a.weight.unflatten(0, (groups, -1)).transpose(1, 2))
        out: Tensor = self.wo_b(low.transpose(0, 1).flatten(1))
        return out
