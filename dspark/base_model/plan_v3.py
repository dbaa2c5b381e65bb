"""What DeepSeek-V3.2 holds, caches and computes: the yardstick that V4's report measures by.

Source: config.json of DeepSeek-V3.2 and its sparse-attention reference code: multi-head latent
attention with absorbed projections, on the tokens that a lightning indexer selects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dspark.base_model.plan_parts import (
    CacheBytes,
    FlopTerm,
    Kind,
    Precision,
    Store,
    Tensors,
    matmul_terms,
)

__all__ = ["V32", "V3Config", "v3_cache", "v3_cache_read", "v3_flops", "v3_tensors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class V3Config:
    """Shape of DeepSeek-V3.2; names as in its config.json."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    moe_intermediate_size: int = 2048
    first_k_dense_replace: int = 3
    intermediate_size: int = 18432
    num_nextn_predict_layers: int = 1
    max_position_embeddings: int = 163840


V32 = V3Config()
"""The released model."""


def v3_tensors(config: V3Config = V32) -> tuple[Tensors, ...]:
    """Every tensor but quantisation scales; the MTP layer shares embedding and head."""
    vocab, hidden, layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
    dense = config.first_k_dense_replace
    head = Tensors(kind=Kind.EMBEDDING, rows=vocab, cols=hidden, precision=Precision.BF16)
    parts = [
        (1, [replace(head, active=0, precision=None), head, _norm(hidden)]),
        (layers, _attention(config)),
        (dense, _ffn(Kind.DENSE, hidden, config.intermediate_size)),
        (layers - dense, _experts(config)),
    ]
    mtp = [
        *_attention(config),
        *_experts(config),
        _matrix(Kind.DRAFT, hidden, 2 * hidden),
        *[_norm(hidden)] * 3,
    ]
    drafts = [replace(t, kind=Kind.DRAFT, active=0, precision=None) for t in mtp]
    parts.append((config.num_nextn_predict_layers, drafts))
    return tuple(
        replace(t, count=n * t.count, active=None if t.active is None else n * t.active)
        for n, tensors in parts
        for t in tensors
    )


def v3_flops(tokens: int, config: V3Config = V32) -> tuple[FlopTerm, ...]:
    """Work for the last of `tokens` tokens.

    Absorbed attention: scores over latent + rope numbers, values over the latent, 2 FLOPs each a
    head, on min(n, top-k) tokens. The indexer scores all n tokens, 2·heads·size each.

    Args:
        tokens: n >= 1, the decoded token included.
        config: The model.
    """
    width = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    rows = config.num_hidden_layers * min(tokens, config.index_topk)
    attention = 2 * config.num_attention_heads * width * rows
    size = config.index_n_heads * config.index_head_dim
    scores = 2 * config.num_hidden_layers * size * tokens
    return (
        *matmul_terms(v3_tensors(config)),
        FlopTerm(name="attention over selection", flops=attention, precision=Precision.BF16),
        FlopTerm(name="indexer scores", flops=scores, precision=Precision.FP8),
    )


def v3_cache(tokens: int, config: V3Config = V32) -> CacheBytes:
    """Bytes of one sequence in the deployed format.

    A token takes 656 bytes in a layer (512 FP8 latents, a float32 scale a 128 of them, 64 rotated
    numbers in bf16) and 132 for its indexer key (128 in FP8, a float32 scale).

    Args:
        tokens: n >= 0 tokens of context.
        config: The model.
    """
    layers = config.num_hidden_layers
    return CacheBytes(
        latents=layers * tokens * _row_bytes(config),
        indexer_keys=layers * tokens * (config.index_head_dim + 4),
    )


def v3_cache_read(tokens: int, config: V3Config = V32) -> CacheBytes:
    """Bytes of the cache that one token reads: selected latents, every indexer key."""
    rows = config.num_hidden_layers * min(tokens, config.index_topk)
    return replace(v3_cache(tokens, config), latents=rows * _row_bytes(config))


def _row_bytes(config: V3Config) -> int:
    latent = config.kv_lora_rank
    return latent + 4 * (latent // 128) + 2 * config.qk_rope_head_dim


def _matrix(kind: Kind, rows: int, cols: int) -> Tensors:
    return Tensors(kind=kind, rows=rows, cols=cols, store=Store.FP8_F32, precision=Precision.FP8)


def _norm(size: int) -> Tensors:
    return Tensors(kind=Kind.NORM, rows=1, cols=size)


def _attention(config: V3Config) -> list[Tensors]:
    """Attention, indexer and the layer's two norms."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    index = config.index_n_heads * config.index_head_dim
    kind = Kind.ATTENTION
    return [
        _matrix(kind, config.q_lora_rank, hidden),
        _matrix(kind, heads * (nope + rope), config.q_lora_rank),
        _matrix(kind, latent + rope, hidden),
        # Absorbed into query and output, head by head, in bf16: as many products as numbers.
        replace(_matrix(kind, heads * (nope + value), latent), precision=Precision.BF16),
        _matrix(kind, hidden, heads * value),
        _matrix(Kind.INDEXER, index, config.q_lora_rank),
        _matrix(Kind.INDEXER, config.index_head_dim, hidden),
        Tensors(
            kind=Kind.INDEXER, rows=config.index_n_heads, cols=hidden, precision=Precision.BF16
        ),
        _norm(2 * config.index_head_dim),  # weight and bias of the keys' layer norm
        *[_norm(size) for size in (hidden, hidden, config.q_lora_rank, latent)],
    ]


def _ffn(kind: Kind, hidden: int, inner: int) -> list[Tensors]:
    return [replace(_matrix(kind, inner, hidden), count=2), _matrix(kind, hidden, inner)]


def _experts(config: V3Config) -> list[Tensors]:
    hidden, experts = config.hidden_size, config.n_routed_experts
    inner = config.moe_intermediate_size
    chosen = config.num_experts_per_tok
    return [
        Tensors(kind=Kind.GATE, rows=experts, cols=hidden, precision=Precision.BF16),
        Tensors(kind=Kind.GATE, rows=1, cols=experts, store=Store.F32),
        *_ffn(Kind.SHARED, hidden, config.n_shared_experts * inner),
        *[
            replace(t, count=experts * t.count, active=chosen * t.count)
            for t in _ffn(Kind.ROUTED, hidden, inner)
        ],
    ]
