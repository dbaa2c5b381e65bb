"""Settings of a DSpark or DFlash draft module, whatever file they were read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from dspark.errors import ConfigError

__all__ = ["ACTIVATIONS", "HEAD_TYPES", "BackboneConfig", "DSparkConfig", "Window"]

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
HEAD_TYPES = ("vanilla", "gated", "rnn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What a sliding layer of a draft sees.

    Attributes:
        size: Context positions.
        moves: False: every slot of the block sees the `size` positions before the anchor
            (speculators, DeepSeek-V4). True: the window ends at the slot itself and counts it
            (SpecForge), so later slots see less of the context.
        is_causal: A slot sees itself and earlier slots of the block only.
    """

    size: int
    moves: bool = False
    is_causal: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"sliding_window is {self.size}, but must be >= 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneConfig:
    """The decoder layers of a draft; one description for all families.

    Attributes:
        hidden_size: D.
        intermediate_size: Width of the gated MLP.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; divides `num_heads`.
        head_dim: Size of a head, even.
        windows: One entry a layer: None sees the whole context.
        activation: One of ACTIVATIONS.
        norm_eps: Of every RMS norm.
        rope: Rotary parameters as transformers writes them: rope_type, rope_theta and what the
            type needs.
        max_positions: Longest context the rotary parameters were made for.
        attention_scale: Factor of query-key products; None is head_dim ** -0.5.
        has_bias: Bias in the four attention projections.
        has_qk_norm: RMS norm of every query and key head (Qwen3, Gemma).
        has_v_norm: RMS norm without weight of every value head (Gemma 4).
        shares_kv: Values are the key projection (Gemma 4's attention_k_eq_v).
        has_four_norms: Norms after attention and MLP besides those before (Gemma).
        has_layer_scalar: Each layer's output is multiplied by a stored scalar (Gemma 4).

    Raises:
        ConfigError: If a value is out of range.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[Window | None, ...]
    activation: str = "silu"
    norm_eps: float = 1e-6
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_theta": 10000.0})
    max_positions: int = 4096
    attention_scale: float | None = None
    has_bias: bool = False
    has_qk_norm: bool = True
    has_v_norm: bool = False
    shares_kv: bool = False
    has_four_norms: bool = False
    has_layer_scalar: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be >= 1.")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_key_value_heads is {self.num_kv_heads}, but must divide "
                f"num_attention_heads, {self.num_heads}."
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}, but must be even.")
        if not self.windows:
            raise ConfigError("num_hidden_layers is 0, but a draft needs a layer.")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act is {self.activation!r}, but must be one of {', '.join(ACTIVATIONS)}."
            )

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.windows)


@dataclass(frozen=True, slots=True, kw_only=True)
class DSparkConfig:
    """A draft module.

    Attributes:
        family: qwen3, gemma4 or llama: how its layers are named on disk.
        backbone: Its layers.
        vocab_size: V of the target.
        draft_vocab_size: Vd, tokens it can propose; V unless the vocabulary is reduced.
        block_size: Slots of the block it was trained with; another number changes all outputs.
        sample_from_anchor: True (DSpark): the anchor's slot predicts the first token, so gamma is
            block_size. False (DFlash): it predicts nothing, and gamma is block_size - 1.
        mask_token_id: Token of the slots after the anchor's.
        target_layer_ids: Layers whose outputs it reads, -1 for the embeddings, ascending.
        target_hidden_size: Width of these.
        num_target_layers: Layers of the target it was trained for.
        markov_rank: Rank of the sequential head, 0 for none.
        markov_head_type: One of HEAD_TYPES.
        enable_confidence_head: It has a confidence head.
        confidence_head_with_markov: Which reads W1 of the previous token too.
        owns_embedding: It brings its own embedding; else the target's is used.
        owns_head: It brings its own output head; else the target's is used, or with a reduced
            vocabulary its rows of these tokens.
        embed_scale: Factor of its own embedding (Gemma).
        logit_softcap: Soft-cap of its own head's logits, before the sequential head (Gemma).

    Raises:
        ConfigError: If a value is out of range or contradicts another.
    """

    family: str
    backbone: BackboneConfig
    vocab_size: int
    draft_vocab_size: int
    block_size: int
    sample_from_anchor: bool
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    target_hidden_size: int
    num_target_layers: int
    markov_rank: int = 0
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool = False
    owns_embedding: bool = True
    owns_head: bool = True
    embed_scale: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        least = 1 if self.sample_from_anchor else 2
        if self.block_size < least:
            raise ConfigError(f"block_size is {self.block_size}, but must be >= {least}.")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ConfigError(
                f"mask_token_id is {self.mask_token_id}, but must be from 0 to "
                f"{self.vocab_size - 1}."
            )
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ConfigError(
                f"draft_vocab_size is {self.draft_vocab_size}, but must be from 1 to "
                f"{self.vocab_size}."
            )
        self._check_layers()
        self._check_heads()

    def _check_layers(self) -> None:
        ids, last = self.target_layer_ids, self.num_target_layers - 2
        if not ids or any(a >= b for a, b in pairwise(ids)):
            raise ConfigError(f"target_layer_ids are {list(ids)}, but must ascend, each once.")
        if not -1 <= ids[0] <= ids[-1] <= last:
            raise ConfigError(
                f"target_layer_ids are {list(ids)}, but must be from -1 to {last} (drafts are not "
                f"trained on the last of {self.num_target_layers} layers: what is recorded of it "
                "has passed the final norm)."
            )

    def _check_heads(self) -> None:
        if self.markov_rank < 0:
            raise ConfigError(f"markov_rank is {self.markov_rank}, but must be >= 0.")
        if self.markov_rank and self.markov_head_type not in HEAD_TYPES:
            raise ConfigError(
                f"markov_head_type is {self.markov_head_type!r}, but must be one of "
                f"{', '.join(HEAD_TYPES)}."
            )
        if self.confidence_head_with_markov and not self.markov_rank:
            raise ConfigError("confidence_head_with_markov is true, but markov_rank is 0.")

    @property
    def gamma(self) -> int:
        """Tokens of a drafted path at the most."""
        return self.block_size - (not self.sample_from_anchor)

    @property
    def needs_head_rows(self) -> bool:
        """It uses some rows of the target's head."""
        return not self.owns_head and self.draft_vocab_size != self.vocab_size

    @property
    def first_slot(self) -> int:
        """Slot of the block that predicts depth 1."""
        return 0 if self.sample_from_anchor else 1
