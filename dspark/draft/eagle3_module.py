"""The EAGLE-3 draft network: one decoder layer over (token, feature) pairs.

Row t pairs the token at t + 1 with a feature of position t: hidden states of three (or five) target
layers, concatenated and projected by `fc`. The layer reads [norm(embedding) ; norm(feature)], twice
its width; the feature is the residual stream. The head predicts the token at t + 2, over a draft
vocabulary that may be smaller than the target's. The layer's output stands in for the feature of
t + 1, which no forward of the target has yielded yet, so the layer can go on by itself.

With one layer, K/V of a row depend on its token, feature and position alone: rows that nobody asks
about need no attention. So the layer comes apart into `enter`, `keys_values` and `decode`, and the
caller owns the K/V and says what a row may see.

**Source:** EAGLE-3, arXiv 2503.01840, sections 3.1 and 3.2; options as vLLM 0.33, SGLang 0.5.23,
speculators 0.9 and DeepSpec read them.

Letters: n rows, D draft width, E width of the target's hidden states, A captured layers, H query
heads, K key/value heads, d head size, V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.errors import CapabilityError, ConfigError

__all__ = ["Attend", "Eagle3Config", "Eagle3Module"]

Attend = Callable[[Tensor], Tensor]
"""Attention of rotated queries [n, H, d] over whatever K/V their rows may see, -> [n, H * d]."""

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
_SCALED_ROPE = ("linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3Config:
    """Shape and options of the draft; the defaults are those of a Llama layer.

    Attributes:
        hidden_size: D.
        target_hidden_size: E.
        target_layers: Target layers whose OUTPUTS feed `fc`, in the order of its input; -1 is the
            embeddings.
        intermediate_size: Width of the MLP.
        num_heads: H.
        num_kv_heads: K, a divisor of H.
        head_dim: d, even.
        vocab_size: V.
        draft_vocab_size: W <= V.
        max_positions: Longest context the draft was configured for; only some RoPE types use it.
        rms_norm_eps: Added to the mean square, > 0.
        activation: Of the MLP.
        rope: RoPE parameters as in config.json: rope_type, rope_theta, ...
        has_embedding: The draft has an embedding of its own; else the target's is used.
        embed_scale: Factor on rows of its own embedding.
        attention_bias: Biases in the attention projections.
        mlp_bias: Biases in the MLP.
        attention_scale: Factor on q.k; None is 1 / sqrt(d).
        qk_norm: RMS norms on queries and keys (Qwen3, Gemma).
        v_norm: A scale-free RMS norm on values (Gemma 4).
        key_is_value: Values are the key projection, before its norm (Gemma 4).
        sandwich_norms: Norms after attention and around the MLP (Gemma).
        layer_scalar: A stored factor on the layer's output (Gemma 4).
        logit_softcap: Final soft-cap, or None.
        norm_before_residual: The normed feature is the residual, not the feature itself.
        norm_before_fc: One RMS norm over the whole input of `fc`.
        fc_norm: One RMS norm for each captured layer before `fc` (EAGLE-3.1).
        norm_output: The recurrent feature is taken after the final norm (EAGLE-3.1), not before.

    Raises:
        ConfigError: If a value is out of range or contradicts another.
    """

    hidden_size: int
    target_hidden_size: int
    target_layers: tuple[int, ...]
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    max_positions: int = 2048
    rms_norm_eps: float = 1e-6
    activation: str = "silu"
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_theta": 10000.0})
    has_embedding: bool = False
    embed_scale: float = 1.0
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float | None = None
    qk_norm: bool = False
    v_norm: bool = False
    key_is_value: bool = False
    sandwich_norms: bool = False
    layer_scalar: bool = False
    logit_softcap: float | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "target_hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
            "draft_vocab_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be >= 1.")
        if self.draft_vocab_size > self.vocab_size:
            raise ConfigError(
                f"draft_vocab_size is {self.draft_vocab_size}, but must be at most vocab_size, "
                f"{self.vocab_size}."
            )
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ConfigError(
                f"{self.num_heads} heads of size {self.head_dim} do not fit {self.num_kv_heads} "
                "key/value heads: their number must be a multiple and their size even."
            )
        if not self.target_layers:
            raise ConfigError("target_layers is empty, but the draft needs at least one layer.")
        if self.fc_norm and self.norm_before_fc:
            raise ConfigError("fc_norm and norm_before_fc are both set, but exclude each other.")
        if self.activation not in _ACTIVATIONS:
            known = ", ".join(sorted(_ACTIVATIONS))
            raise ConfigError(f"hidden_act is {self.activation!r}, but must be one of {known}.")
        kind = self.rope.get("rope_type", "default")
        if kind not in ("default", *_SCALED_ROPE):
            raise ConfigError(
                f"rope_type is {kind!r}, but must be default, {', '.join(_SCALED_ROPE)}: others "
                "make rows depend on the longest position of a batch."
            )


def _wide(x: Tensor) -> Tensor:
    """In float32 at least; float64 stays, so that tests can compare to the last digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32; without a weight if `scaled` is False."""

    def __init__(self, size: int, eps: float, *, scaled: bool = True) -> None:
        super().__init__()
        self._size, self._eps = size, eps
        self.weight = nn.Parameter(torch.ones(size)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis: [..., size] -> the same."""
        weight = None if self.weight is None else _wide(self.weight)
        return F.rms_norm(_wide(x), (self._size,), weight, self._eps).to(x.dtype)


def rope_frequencies(config: Eagle3Config) -> tuple[Tensor, float]:
    """Inverse frequencies, float32 [d / 2], and the factor on cosines and sines."""
    kind = config.rope.get("rope_type", "default")
    if kind == "default":
        theta = float(config.rope.get("rope_theta", 10000.0))
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
        return 1.0 / theta ** (exponents / config.head_dim), 1.0
    from transformers import PreTrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # The scaled kinds are transformers' own: what a draft was trained with is what they compute.
    build: Any = PreTrainedConfig
    with torch.device("cpu"):  # also while the module is built on the meta device
        stand_in = build(
            rope_parameters=dict(config.rope),
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_positions,
        )
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](stand_in, "cpu")
    return frequencies.float(), float(factor)


class _Attention(nn.Module):
    """Projections, norms and rotation; the attention itself is the caller's."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        wide, bias = 2 * config.hidden_size, config.attention_bias
        queries, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self._head_dim = config.head_dim
        self.q_proj = nn.Linear(wide, queries, bias=bias)
        self.k_proj = nn.Linear(wide, keys, bias=bias)
        self.v_proj = None if config.key_is_value else nn.Linear(wide, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=bias)
        normed = config.qk_norm
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if normed else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if normed else None
        self.v_norm = (
            RMSNorm(config.head_dim, config.rms_norm_eps, scaled=False) if config.v_norm else None
        )
        self._frequencies, self._rope_factor = rope_frequencies(config)

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotated queries [n, H, d]."""
        q = self.q_proj(x).unflatten(1, (-1, self._head_dim))
        return self._rotate(q if self.q_norm is None else self.q_norm(q), positions)

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values, [n, K, d] each."""
        k = self.k_proj(x).unflatten(1, (-1, self._head_dim))
        v = k if self.v_proj is None else self.v_proj(x).unflatten(1, (-1, self._head_dim))
        if self.k_norm is not None:
            k = self.k_norm(k)
        return self._rotate(k, positions), v if self.v_norm is None else self.v_norm(v)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, None].float() * self._frequencies.to(x.device)
        angles = angles.to(torch.promote_types(x.dtype, torch.float32))
        cos = (angles.cos() * self._rope_factor).to(x.dtype)[:, None]
        sin = (angles.sin() * self._rope_factor).to(x.dtype)[:, None]
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class _MLP(nn.Module):
    """Gated MLP."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        size, wide, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, wide, bias=bias)
        self.up_proj = nn.Linear(size, wide, bias=bias)
        self.down_proj = nn.Linear(wide, size, bias=bias)
        self._activation = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[n, D] -> [n, D]."""
        gated: Tensor = self.down_proj(self._activation(self.gate_proj(x)) * self.up_proj(x))
        return gated


class _Layer(nn.Module):
    """The decoder layer; see the module."""

    layer_scalar: Tensor

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps)

        self.self_attn = _Attention(config)
        self.mlp = _MLP(config)
        self.hidden_norm, self.input_layernorm = norm(), norm()
        self.post_attention_layernorm = norm()
        self._normed_residual = config.norm_before_residual
        self._is_sandwich, self._is_scaled = config.sandwich_norms, config.layer_scalar
        if config.sandwich_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()
        if config.layer_scalar:
            self.register_buffer("layer_scalar", torch.ones(1))

    def enter(self, embedded: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.hidden_norm(feature)
        x = torch.cat((self.input_layernorm(embedded), normed), dim=-1)
        return x, (normed if self._normed_residual else feature)

    def decode(self, x: Tensor, residual: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        seen: Tensor = self.self_attn.o_proj(attend(self.self_attn.queries(x, positions)))
        if self._is_sandwich:
            hidden: Tensor = residual + self.post_attention_layernorm(seen)
            changed = self.mlp(self.pre_feedforward_layernorm(hidden))
            hidden = hidden + self.post_feedforward_layernorm(changed)
        else:
            hidden = residual + seen
            hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden * self.layer_scalar if self._is_scaled else hidden


class Eagle3Module(nn.Module):
    """The network. Parameter names are those of the released checkpoints.

    Args:
        config: Shape and options.

    Attributes:
        config: The same.
        d2t: int64 [W], offset from a draft token id to the target's; only where W < V.
    """

    d2t: Tensor

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        size, wide = config.hidden_size, config.target_hidden_size * len(config.target_layers)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, size) if config.has_embedding else None
        self.fc = nn.Linear(wide, size, bias=False)
        self.input_norm = RMSNorm(wide, config.rms_norm_eps) if config.norm_before_fc else None
        self.fc_norm: nn.ModuleList | None = None
        if config.fc_norm:
            norms = (
                RMSNorm(config.target_hidden_size, config.rms_norm_eps)
                for _ in config.target_layers
            )
            self.fc_norm = nn.ModuleList(norms)
        self.layers = nn.ModuleList([_Layer(config)])
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        if config.draft_vocab_size < config.vocab_size:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))

    @property
    def _layer(self) -> _Layer:
        return cast(_Layer, self.layers[0])

    @property
    def scale(self) -> float:
        """Factor on q.k."""
        given = self.config.attention_scale
        return self.config.head_dim**-0.5 if given is None else given

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows [n, D] of its own embedding for int64 [n].

        Raises:
            CapabilityError: If it has none.
        """
        if self.embed_tokens is None:
            raise CapabilityError("this EAGLE-3 draft has no embedding of its own.")
        rows: Tensor = self.embed_tokens(tokens)
        if self.config.embed_scale == 1.0:
            return rows
        return rows * torch.tensor(self.config.embed_scale).to(rows)  # rounded as Gemma does

    def fuse(self, hidden: list[Tensor]) -> Tensor:
        """Make features of the target's hidden states.

        Args:
            hidden: [n, E] for every entry of `target_layers`, in that order.

        Returns:
            Features [n, D].
        """
        if self.fc_norm is not None:
            hidden = [norm(rows) for norm, rows in zip(self.fc_norm, hidden, strict=True)]
        wide = torch.cat(hidden, dim=-1)
        features: Tensor = self.fc(wide if self.input_norm is None else self.input_norm(wide))
        return features

    def enter(self, embedded: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Join embeddings and features, [n, D] each.

        Returns:
            The layer's input [n, 2 D] and its residual [n, D].
        """
        return self._layer.enter(embedded, feature)

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [n, K, d] of rows of layer input [n, 2 D] at int64 [n] positions."""
        return self._layer.self_attn.keys_values(x, positions)

    def decode(self, x: Tensor, residual: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the layer on rows.

        Args:
            x: Layer input [n, 2 D].
            residual: Residual [n, D].
            positions: int64 [n], positions of the features.
            attend: The attention; the rows' own K/V must be in what it reads.

        Returns:
            The layer's output [n, D], before the final norm.
        """
        return self._layer.decode(x, residual, positions, attend)

    def finish(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits over the draft vocabulary, and what stands in for the next features.

        Args:
            hidden: Output of `decode`, [n, D].

        Returns:
            Logits [n, W] and features [n, D].
        """
        normed, feature = self.outputs(hidden)
        return self.logits(normed), feature

    def outputs(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the head gets, and what stands in for the next features; [n, D] each.

        Args:
            hidden: Output of `decode`, [n, D].
        """
        normed: Tensor = self.norm(hidden)
        return normed, normed if self.config.norm_output else hidden

    def logits(self, normed: Tensor) -> Tensor:
        """Logits [n, W] of what the head gets, [n, D]."""
        logits: Tensor = self.lm_head(normed)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def target_ids(self) -> Tensor | None:
        """int64 [W], the target's id of every draft token; None where the two are the same."""
        if self.config.draft_vocab_size == self.config.vocab_size:
            return None
        return self.d2t + torch.arange(self.config.draft_vocab_size, device=self.d2t.device)
