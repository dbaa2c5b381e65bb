"""Decoder layers of a draft: Qwen3, Gemma 4 and Llama style from one implementation.

A layer has two entrances. Context rows give keys and values only: its own k and v projections of a
vector c that is the same for all layers, without the layer's input norm. Block rows pass through
the whole layer; whom they see is the caller's business, who hands in the attention: per request
over a cache when drafting, over packed anchors when training.

**Source:** DSpark, arXiv 2607.05147, section 3; DeepSpec's draft models for the order of norms.

Letters: N rows, D hidden size, H query heads, J key/value heads, E head size, L rows seen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.draft.dspark_config import BackboneConfig
from dspark.errors import ConfigError

__all__ = ["Attend", "DraftLayer", "RMSNorm", "Rotary", "attend_rows"]

Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries [N, H, E] scaled, keys [N, J, E], values [N, J, E]) -> [N, H, E]."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, computed in float32.

    Args:
        size: Its width.
        eps: Added to the mean square.
        has_weight: False for Gemma 4's norm of values.
    """

    def __init__(self, size: int, eps: float, *, has_weight: bool = True) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if has_weight else None

    def forward(self, rows: Tensor) -> Tensor:
        """Norm of [..., size], in the dtype of the input."""
        weight = None if self.weight is None else self.weight.float()
        return F.rms_norm(rows.float(), (self.size,), weight, self.eps).to(rows.dtype)


class Rotary:
    """Rotary position embedding; angles depend on the position alone.

    Args:
        config: The backbone.

    Raises:
        ConfigError: If the rotary type is unknown, or looks at the length of the text.
    """

    def __init__(self, config: BackboneConfig) -> None:
        with torch.device("cpu"):  # modules are built on the meta device when loading
            self._frequencies, self._scale = _frequencies(config)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine [N, 1, E] for positions int64 [N]."""
        self._frequencies = self._frequencies.to(positions.device)
        angles = positions[:, None].float() * self._frequencies
        angles = torch.cat([angles, angles], dim=-1)[:, None, :]
        return (angles.cos() * self._scale).to(dtype), (angles.sin() * self._scale).to(dtype)


def _frequencies(config: BackboneConfig) -> tuple[Tensor, float]:
    rope: dict[str, Any] = dict(config.rope)
    kind = rope.setdefault("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise ConfigError(
            f"rope_type of the draft is {kind!r}, but must be one of {', '.join(_ROPE_TYPES)}."
        )
    size = config.head_dim
    if kind == "default":
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError("partial_rotary_factor of the draft must be 1 for rope_type default.")
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        return 1.0 / (float(rope["rope_theta"]) ** exponents), 1.0
    from transformers import PreTrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    make_holder: Any = PreTrainedConfig  # its signature lacks the fields of models
    holder = make_holder(
        rope_parameters=rope,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        head_dim=size,
        max_position_embeddings=config.max_positions,
    )
    try:
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](holder, torch.device("cpu"))
    except KeyError as exc:
        raise ConfigError(f"rope_parameters of the draft lack {exc}.") from exc
    return frequencies.float(), float(scale)


def _rotate(rows: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = angles
    left, right = rows.chunk(2, dim=-1)
    return rows * cosine + torch.cat([-right, left], dim=-1) * sine


class _Attention(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        hidden, size, bias = config.hidden_size, config.head_dim, config.has_bias
        self.size = size
        self.scale = config.attention_scale or size**-0.5
        self.q_proj = nn.Linear(hidden, config.num_heads * size, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * size, bias=bias)
        self.v_proj = (
            None if config.shares_kv else nn.Linear(hidden, config.num_kv_heads * size, bias=bias)
        )
        self.o_proj = nn.Linear(config.num_heads * size, hidden, bias=bias)
        has_qk = config.has_qk_norm
        self.q_norm = RMSNorm(size, config.norm_eps) if has_qk else None
        self.k_norm = RMSNorm(size, config.norm_eps) if has_qk else None
        self.v_norm = (
            RMSNorm(size, config.norm_eps, has_weight=False) if config.has_v_norm else None
        )

    def queries(self, rows: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        heads = self.q_proj(rows).unflatten(-1, (-1, self.size))
        if self.q_norm is not None:
            heads = self.q_norm(heads)
        return _rotate(heads, angles) * self.scale

    def keys_values(self, rows: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        keys = self.k_proj(rows).unflatten(-1, (-1, self.size))
        values = keys
        if self.v_proj is not None:
            values = self.v_proj(rows).unflatten(-1, (-1, self.size))
        if self.k_norm is not None:
            keys = self.k_norm(keys)
        if self.v_norm is not None:
            values = self.v_norm(values)
        return _rotate(keys, angles), values


class _GatedMLP(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.activation(self.gate_proj(rows)) * self.up_proj(rows))
        return out


class DraftLayer(nn.Module):
    """One decoder layer; parameter names are those of transformers.

    Args:
        config: The backbone.
        index: Which layer it is.
    """

    def __init__(self, config: BackboneConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.self_attn = _Attention(config)
        self.mlp = _GatedMLP(config)
        size, eps = config.hidden_size, config.norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.has_four_norms = config.has_four_norms
        if config.has_four_norms:
            self.pre_feedforward_layernorm = RMSNorm(size, eps)
            self.post_feedforward_layernorm = RMSNorm(size, eps)
        self.layer_scalar: Tensor | None
        self.register_buffer("layer_scalar", torch.ones(1) if config.has_layer_scalar else None)

    def context(self, rows: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values [N, J, E] of context vectors c [N, D]."""
        return self.self_attn.keys_values(rows, angles)

    def forward(self, rows: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Run block rows [N, D] through the layer."""
        attention = self.self_attn
        normed = self.input_layernorm(rows)
        keys, values = attention.keys_values(normed, angles)
        seen = attend(self.index, attention.queries(normed, angles), keys, values)
        out = attention.o_proj(seen.flatten(1))
        if not self.has_four_norms:
            rows = rows + out
            rows = rows + self.mlp(self.post_attention_layernorm(rows))
        else:
            rows = rows + self.post_attention_layernorm(out)
            inner = self.mlp(self.pre_feedforward_layernorm(rows))
            rows = rows + self.post_feedforward_layernorm(inner)
        return rows if self.layer_scalar is None else rows * self.layer_scalar


def attend_rows(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of a few rows, without causality.

    Two batched products, in which the query heads that share a key head are rows of one: keys are
    not repeated, and the result of a request does not depend on others.

    Args:
        queries: [N, H, E], scaled.
        keys: [J, L, E].
        values: [J, L, E].
        mask: bool [N, L], True where seen; None for everywhere.

    Returns:
        [N, H, E].
    """
    count, heads, size = queries.shape
    shared = keys.shape[0]
    grouped = queries.view(count, shared, heads // shared, size).permute(1, 2, 0, 3)
    scores = torch.matmul(grouped.reshape(shared, -1, size), keys.transpose(1, 2)).float()
    if mask is not None:
        scores = scores.view(shared, -1, count, keys.shape[1]).masked_fill(~mask, -torch.inf)
        scores = scores.view(shared, -1, keys.shape[1])
    out = torch.matmul(torch.softmax(scores, dim=-1).to(values.dtype), values)
    return out.view(shared, heads // shared, count, size).permute(2, 0, 1, 3).flatten(1, 2)
