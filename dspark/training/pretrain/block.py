"""The rest of a V4 block, with gradients: hyper-connections, router, experts.

The experts of a layer are stacked, `w13` above `w1` and `w3`, so that one product serves an expert.
Letters: n rows, N streams, D hidden, E experts, k chosen, I inner width, m = n * k places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.base_model.config import V4Config
from dspark.training.pretrain.attention import Attention, Notes, RMSNorm, Shape
from dspark.training.pretrain.ops import (
    Dispatch,
    grouped_linear,
    join_rows,
    project_streams,
    select_rows,
    sinkhorn,
    write_streams,
)

__all__ = ["Block", "collapse_streams"]


class Router(nn.Module):
    """Chooses experts, by score or from a table.

    Args:
        config: The model.
        is_hashed: Choose by token id.
    """

    bias: Tensor
    tid2eid: Tensor

    def __init__(self, config: V4Config, *, is_hashed: bool) -> None:
        super().__init__()
        self._config, self.is_hashed = config, is_hashed
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if is_hashed:
            table = torch.arange(config.vocab_size)[:, None] + torch.arange(
                config.num_experts_per_tok
            )
            self.register_buffer("tid2eid", table % config.n_routed_experts)
        else:
            self.register_buffer("bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Experts int64 [n, k], their weights [n, k], and all scores [n, E]."""
        scores = F.softplus(F.linear(x, self.weight)).sqrt()
        if self.is_hashed:
            chosen = self.tid2eid[token_ids]
        else:
            ranked = (scores.detach() + self.bias).sort(dim=-1, descending=True, stable=True)
            chosen = ranked.indices[:, : self._config.num_experts_per_tok]
        picked = scores.gather(1, chosen)
        weights = picked / picked.sum(-1, keepdim=True) * self._config.routed_scaling_factor
        return chosen, weights, scores


class Experts(nn.Module):
    """The routed experts of a layer, stacked.

    Args:
        config: The model.
    """

    def __init__(self, config: V4Config) -> None:
        super().__init__()
        wide, narrow = config.hidden_size, config.moe_intermediate_size
        count, self._limit = config.n_routed_experts, config.swiglu_limit
        self.w13 = nn.Parameter(torch.empty(count, 2, narrow, wide))
        self.w2 = nn.Parameter(torch.empty(count, wide, narrow))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, list[int]]:
        """Sum of the chosen experts [n, D] of rows [n, D], and the rows of every expert."""
        dispatch = Dispatch.of(chosen, self.w13.shape[0])
        both = grouped_linear(select_rows(x, dispatch), self.w13.flatten(1, 2), dispatch.bounds)
        inner = clamped_swiglu(both, self._limit) * weights.flatten()[dispatch.order][:, None]
        out = grouped_linear(inner, self.w2, dispatch.bounds)
        return join_rows(out, dispatch), dispatch.counts


def clamped_swiglu(both: Tensor, limit: float) -> Tensor:
    """silu(gate) * up with clamps, of gate and up [m, 2I]."""
    gate, up = both.chunk(2, dim=-1)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


class SharedExpert(nn.Module):
    """The expert that every row goes through.

    Args:
        config: The model.
    """

    def __init__(self, config: V4Config) -> None:
        super().__init__()
        wide, narrow = config.hidden_size, config.moe_intermediate_size
        self._limit = config.swiglu_limit
        self.w1 = nn.Linear(wide, narrow, bias=False)
        self.w2 = nn.Linear(narrow, wide, bias=False)
        self.w3 = nn.Linear(wide, narrow, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, D] of [n, D]."""
        both = F.linear(x, torch.cat((self.w1.weight, self.w3.weight)))
        out: Tensor = self.w2(clamped_swiglu(both, self._limit))
        return out


class MixtureOfExperts(nn.Module):
    """Router, routed experts, shared expert.

    Args:
        config: The model.
        is_hashed: Choose experts by token id.
    """

    def __init__(self, config: V4Config, *, is_hashed: bool) -> None:
        super().__init__()
        self.gate = Router(config, is_hashed=is_hashed)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)

    def forward(self, x: Tensor, token_ids: Tensor, batch: int, notes: Notes) -> Tensor:
        """[n, D] of normed rows [n, D] of `batch` sequences."""
        chosen, weights, scores = self.gate(x, token_ids)
        out, counts = self.experts(x, chosen, weights)
        if self.training and not self.gate.is_hashed:
            notes.loads.append((self.gate, counts))
            notes.balance.append(_balance(scores, chosen, batch))
        total: Tensor = out + self.shared_experts(x)
        return total


def _balance(scores: Tensor, chosen: Tensor, batch: int) -> Tensor:
    """Balance loss inside sequences: 1 if all experts get the same.

    **Source:** DeepSeek-V3, arXiv 2412.19437, Eq. 17-20.
    """
    experts = scores.shape[1]
    share = (scores / scores.sum(-1, keepdim=True)).unflatten(0, (batch, -1)).mean(1)
    picked = chosen.reshape(batch, -1)
    hits = scores.new_zeros(batch, experts).scatter_add_(1, picked, scores.new_ones(picked.shape))
    out: Tensor = (hits * (experts / picked.shape[1]) * share).sum(-1).mean()
    return out


def collapse_streams(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: V4Config
) -> Tensor:
    """Streams [n, N, D] weighted into the final hidden state [n, D]."""
    gate = project_streams(streams, fn, config.rms_norm_eps) * scale + base
    return torch.bmm((torch.sigmoid(gate) + config.hc_eps)[:, None], streams)[:, 0]


class Block(nn.Module):
    """A decoder layer, or a stage of a draft module.

    Args:
        config: The model.
        layer: Its number; draft stages count on behind the decoder layers.
    """

    def __init__(self, config: V4Config, layer: int) -> None:
        super().__init__()
        self._config = config
        is_hashed = config.is_hash_layer(layer) and layer < config.num_hidden_layers
        self.attn = Attention(config, layer)
        self.ffn = MixtureOfExperts(config, is_hashed=is_hashed)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        rows, width = (2 + config.hc_mult) * config.hc_mult, config.hc_mult * config.hidden_size
        for half in ("attn", "ffn"):
            self.register_parameter(f"hc_{half}_fn", nn.Parameter(torch.empty(rows, width)))
            self.register_parameter(f"hc_{half}_base", nn.Parameter(torch.zeros(rows)))
            self.register_parameter(f"hc_{half}_scale", nn.Parameter(torch.ones(3)))

    def forward(self, streams: Tensor, token_ids: Tensor, shape: Shape, notes: Notes) -> Tensor:
        """Streams [n, N, D] behind the block."""
        return self.run(
            streams, token_ids, shape.batch, notes, lambda x: self.attn(x, shape, notes)
        )

    def run(
        self,
        streams: Tensor,
        token_ids: Tensor,
        batch: int,
        notes: Notes,
        attention: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The block around an attention of the caller's, normed rows [n, D] to [n, D]."""
        u, post, comb = self._read(streams, "attn")
        streams = write_streams(streams, attention(self.attn_norm(u)), post, comb)
        u, post, comb = self._read(streams, "ffn")
        y = self.ffn(self.ffn_norm(u), token_ids, batch, notes)
        return write_streams(streams, y, post, comb)

    def _read(self, streams: Tensor, half: str) -> tuple[Tensor, Tensor, Tensor]:
        """Input [n, D] of a half, weights out of it [n, N], between the streams [n, N, N]."""
        c, n = self._config, self._config.hc_mult
        base, scale = getattr(self, f"hc_{half}_base"), getattr(self, f"hc_{half}_scale")
        mixes = project_streams(streams, getattr(self, f"hc_{half}_fn"), c.rms_norm_eps)
        pre, post, comb = mixes.split([n, n, n * n], dim=-1)
        pre_base, post_base, comb_base = base.split([n, n, n * n])
        pre = torch.sigmoid(pre * scale[0] + pre_base) + c.hc_eps
        post = 2 * torch.sigmoid(post * scale[1] + post_base)
        comb = (comb * scale[2] + comb_base).unflatten(-1, (n, n))
        u = torch.bmm(pre[:, None], streams)[:, 0]
        return u, post, sinkhorn(comb, c.hc_sinkhorn_iters, c.hc_eps)
