"""Named DeepSeek-V4 configurations: the released models, and small ones with every layer kind."""

from __future__ import annotations

from dataclasses import replace

from dspark.base_model.config import V4Config
from dspark.errors import ConfigError

__all__ = ["PRESETS", "preset"]


def _ratios(layers: int, first: int) -> tuple[int, ...]:
    """Two layers of `first`, then CSA on even layers and HCA on odd ones."""
    return tuple(first if i < 2 else 4 if i % 2 == 0 else 128 for i in range(layers))


_FLASH = V4Config(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_lora_rank=1024,
    o_groups=8,
    compress_ratios=_ratios(43, 0),
    n_routed_experts=256,
    num_experts_per_tok=6,
    moe_intermediate_size=2048,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    draft_stages=1,
)

_PRO = replace(
    _FLASH,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    compress_ratios=_ratios(61, 128),
    n_routed_experts=384,
    moe_intermediate_size=3072,
    index_topk=1024,
    routed_scaling_factor=2.5,
)

_TINY = V4Config(
    vocab_size=512,
    hidden_size=128,
    num_hidden_layers=5,
    num_attention_heads=4,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=64,
    o_lora_rank=32,
    o_groups=2,
    compress_ratios=(0, 4, 8, 4, 0),
    sliding_window=16,
    rope_factor=4.0,
    rope_original=256,
    max_position_embeddings=4096,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    num_hash_layers=2,
)


def _dspark(base: V4Config, layers: tuple[int, ...], rank: int) -> V4Config:
    return replace(
        base,
        draft_stages=3,
        dspark_block_size=5,
        dspark_noise_token_id=128799 if base.vocab_size > 128799 else base.vocab_size - 1,
        dspark_target_layer_ids=layers,
        dspark_markov_rank=rank,
    )


PRESETS: dict[str, V4Config] = {
    "v4-flash": _FLASH,
    "v4-flash-base": replace(_FLASH, expert_dtype="fp8"),
    "v4-flash-dspark": _dspark(_FLASH, (40, 41, 42), 256),
    "v4-pro": _PRO,
    "v4-pro-base": replace(_PRO, expert_dtype="fp8"),
    "v4-pro-dspark": _dspark(_PRO, (58, 59, 60), 512),
    "v4-tiny": _TINY,
    "v4-tiny-dspark": _dspark(_TINY, (2, 3, 4), 16),
    "v4-tiny-mtp": replace(_TINY, draft_stages=1),
}
"""By name. The tiny ones are for tests: every kind of layer, random weights."""


def preset(name: str) -> V4Config:
    """The configuration of a name.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}.", hint=f"presets: {', '.join(PRESETS)}")
    return PRESETS[name]
