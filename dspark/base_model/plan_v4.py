"""What a DeepSeek-V4 model holds, caches and computes, from its configuration alone.

Letters: D hidden size, H heads, c head size, N residual streams, n tokens of context, m positions
that a compressed entry stands for (4 in CSA layers). Source: tensor shapes and dtypes of the
released checkpoints, report sections 2.1 to 2.3.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from dspark.base_model.config import CSA_RATIO, LayerKind, V4Config
from dspark.base_model.plan_parts import (
    CacheBytes,
    FlopTerm,
    Kind,
    Precision,
    Store,
    Tensors,
    matmul_terms,
)

__all__ = ["cache_bytes", "v4_cache", "v4_cache_read", "v4_flops", "v4_tensors"]

_CSA_OVERLAP = 2 * CSA_RATIO - 1  # raw rows that the next CSA entry may still need


def v4_tensors(config: V4Config) -> tuple[Tensors, ...]:
    """Every tensor of the checkpoint but quantisation scales, which `Store` accounts for."""
    vocab, hidden = config.vocab_size, config.hidden_size
    bf16, embedding = Precision.BF16, Kind.EMBEDDING
    found = [
        Tensors(kind=embedding, rows=vocab, cols=hidden, active=0),
        Tensors(kind=embedding, rows=vocab, cols=hidden, precision=bf16),
        *_norms(hidden),
        *_stream_head(config),
    ]
    layers = Counter(
        (config.ratio(i), config.is_hash_layer(i)) for i in range(config.num_hidden_layers)
    )
    for (ratio, is_hash), count in layers.items():
        found += [_times(t, count) for t in _layer(config, ratio, is_hash=is_hash)]
    return (*found, *(_as_draft(t) for t in _draft(config)))


def v4_flops(config: V4Config, tokens: int) -> tuple[FlopTerm, ...]:
    """Work of the target for the last of `tokens` tokens; norms, RoPE, softmax, pooling left out.

    Weights take 2·rows·cols. Attention takes 2·H·(c + c) a row that is attended to (scores and
    values over the same row): min(n, window) window rows in every layer, min(top-k, n div 4)
    entries in CSA layers, n div m in HCA layers. The indexer takes 2·heads·size on each of the
    n div 4 keys of a CSA layer. Mixing the residual streams takes 2·(N·N + 2N)·D each time.

    Args:
        config: The model.
        tokens: n >= 1, the decoded token included.
    """
    per_row = 4 * config.num_attention_heads * config.head_dim
    csa, hca = _csa_layers(config), _hca_entries(config, tokens)
    entries = tokens // CSA_RATIO
    streams, hidden = config.hc_mult, config.hidden_size
    layers = config.num_hidden_layers
    mixing = 2 * layers * (streams * streams + 2 * streams) * hidden + streams * hidden
    window_rows = layers * min(tokens, config.sliding_window)
    csa_rows = csa * min(config.index_topk, entries)
    scores = csa * config.index_n_heads * config.index_head_dim * entries
    bf16 = Precision.BF16
    return (
        *matmul_terms(v4_tensors(config)),
        FlopTerm(name="hyper-connections", flops=2 * mixing, precision=bf16),
        FlopTerm(name="attention over window", flops=per_row * window_rows, precision=bf16),
        FlopTerm(name="attention over selection", flops=per_row * csa_rows, precision=bf16),
        FlopTerm(name="attention over HCA entries", flops=per_row * hca, precision=bf16),
        FlopTerm(name="indexer scores", flops=2 * scores, precision=Precision.FP4),
    )


def cache_bytes(config: V4Config, tokens: int, element_bytes: int = 2) -> CacheBytes:
    """Bytes of one sequence in dspark's own cache.

    Every layer holds min(n, window) rows of c; a CSA layer n div 4 entries of c and as many
    indexer keys; an HCA layer n div m entries of c. Raw float32 rows stay for what is not
    compressed for good: min(n, 7) of 4·c + 4·(indexer head) in a CSA layer, min(n, m - 1) of 2·c
    in an HCA layer.

    Args:
        config: The model.
        tokens: n >= 0 committed tokens.
        element_bytes: Bytes of a number in rows, entries and keys: 2 for bfloat16, 4 for float32.
    """
    row = config.head_dim * element_bytes
    return _cache(config, tokens, row=row, key=config.index_head_dim * element_bytes)


def v4_cache(config: V4Config, tokens: int) -> CacheBytes:
    """Bytes of one sequence in the cache format V4 is deployed with.

    A row or entry is c - r numbers in FP8, r rotated ones in bf16 and a scale byte a 64 numbers
    of c (584 bytes in the released models); an indexer key is FP4 with a scale byte a 32 numbers
    (68 bytes). The raw rows are float32, as in `cache_bytes`.

    Args:
        config: The model.
        tokens: n >= 0 tokens of context.
    """
    return _cache(config, tokens, row=_row_bytes(config), key=_key_bytes(config))


def v4_cache_read(config: V4Config, tokens: int) -> CacheBytes:
    """Bytes of the deployed cache that one decoded token reads.

    All of the window, HCA entries and indexer keys, the selected min(top-k, n div 4) entries of
    a CSA layer; the buffers are next to nothing and left out.

    Args:
        config: The model.
        tokens: n >= 1 tokens of context.
    """
    held = v4_cache(config, tokens)
    selected = _csa_layers(config) * min(config.index_topk, tokens // CSA_RATIO)
    return replace(held, csa_entries=selected * _row_bytes(config), buffers=0)


def _cache(config: V4Config, tokens: int, *, row: int, key: int) -> CacheBytes:
    csa, head = _csa_layers(config), config.head_dim
    keys = csa * (tokens // CSA_RATIO)
    raw = csa * min(tokens, _CSA_OVERLAP) * (4 * head + 4 * config.index_head_dim)
    raw += sum(min(tokens, m - 1) * 2 * head for m in _hca_ratios(config))
    return CacheBytes(
        window=config.num_hidden_layers * min(tokens, config.sliding_window) * row,
        csa_entries=keys * row,
        hca_entries=_hca_entries(config, tokens) * row,
        indexer_keys=keys * key,
        buffers=4 * raw,
    )


def _row_bytes(config: V4Config) -> int:
    return config.head_dim + config.qk_rope_head_dim + -(-config.head_dim // 64)


def _key_bytes(config: V4Config) -> int:
    return -(-config.index_head_dim // 2) + -(-config.index_head_dim // 32)


def _csa_layers(config: V4Config) -> int:
    return sum(config.layer_kind(i) is LayerKind.CSA for i in range(config.num_hidden_layers))


def _hca_ratios(config: V4Config) -> list[int]:
    layers = range(config.num_hidden_layers)
    return [config.ratio(i) for i in layers if config.layer_kind(i) is LayerKind.HCA]


def _hca_entries(config: V4Config, tokens: int) -> int:
    return sum(tokens // m for m in _hca_ratios(config))


def _times(tensors: Tensors, count: int) -> Tensors:
    active = None if tensors.active is None else count * tensors.active
    return replace(tensors, count=count * tensors.count, active=active)


def _as_draft(tensors: Tensors) -> Tensors:
    """A draft stage's tensor: it takes no part in the target's forward."""
    return replace(tensors, kind=Kind.DRAFT, active=0, precision=None)


def _matrix(kind: Kind, rows: int, cols: int) -> Tensors:
    """A matrix that is stored and multiplied in FP8."""
    return Tensors(kind=kind, rows=rows, cols=cols, store=Store.FP8, precision=Precision.FP8)


def _wide(kind: Kind, rows: int, cols: int, *, store: Store = Store.BF16) -> Tensors:
    """A matrix that is stored and multiplied in more than 8 bits."""
    return Tensors(kind=kind, rows=rows, cols=cols, store=store, precision=Precision.BF16)


def _norms(*sizes: int) -> list[Tensors]:
    return [Tensors(kind=Kind.NORM, rows=1, cols=size) for size in sizes]


def _stream_head(config: V4Config) -> list[Tensors]:
    """What brings the residual streams together before a head."""
    streams = config.hc_mult
    return [
        _wide(Kind.HYPER, streams, streams * config.hidden_size, store=Store.F32),
        Tensors(kind=Kind.HYPER, rows=1, cols=streams + 1, store=Store.F32),  # base, scale
    ]


def _layer(config: V4Config, ratio: int, *, is_hash: bool) -> list[Tensors]:
    hidden, streams = config.hidden_size, config.hc_mult
    mixes = (2 + streams) * streams
    hyper = [
        _wide(Kind.HYPER, mixes, streams * hidden, store=Store.F32),
        Tensors(kind=Kind.HYPER, rows=1, cols=mixes + 3, store=Store.F32),  # base, scale
    ]
    return [
        *(_times(t, 2) for t in hyper),
        *_norms(hidden, hidden),
        *_attention(config),
        *_compression(config, ratio),
        *_experts(config, is_hash=is_hash),
    ]


def _attention(config: V4Config) -> list[Tensors]:
    hidden, latent = config.hidden_size, config.q_lora_rank
    heads = config.num_attention_heads * config.head_dim
    grouped = config.o_groups * config.o_lora_rank
    kind = Kind.ATTENTION
    return [
        Tensors(kind=kind, rows=1, cols=config.num_attention_heads, store=Store.F32),  # sinks
        _matrix(kind, latent, hidden),
        _matrix(kind, heads, latent),
        _matrix(kind, config.head_dim, hidden),
        # The grouped output projection is stored in FP8, but multiplied in bf16.
        replace(_matrix(kind, grouped, heads // config.o_groups), precision=Precision.BF16),
        _matrix(kind, hidden, grouped),
        *_norms(latent, config.head_dim),
    ]


def _compression(config: V4Config, ratio: int) -> list[Tensors]:
    if ratio == 0:
        return []
    if ratio != CSA_RATIO:
        return _compressor(config, Kind.COMPRESSOR, ratio, config.head_dim, config.head_dim)
    heads, size = config.index_n_heads, config.index_head_dim
    return [
        *_compressor(config, Kind.COMPRESSOR, ratio, 2 * config.head_dim, config.head_dim),
        *_compressor(config, Kind.INDEXER, ratio, 2 * size, size),
        _matrix(Kind.INDEXER, heads * size, config.q_lora_rank),
        _wide(Kind.INDEXER, heads, config.hidden_size),
    ]


def _compressor(config: V4Config, kind: Kind, ratio: int, width: int, size: int) -> list[Tensors]:
    """Value and gate projections, a bias row for each position of a window, a norm."""
    return [
        _times(_wide(kind, width, config.hidden_size), 2),
        Tensors(kind=kind, rows=ratio, cols=width, store=Store.F32),
        *_norms(size),
    ]


def _experts(config: V4Config, *, is_hash: bool) -> list[Tensors]:
    hidden, inner, experts = (
        config.hidden_size,
        config.moe_intermediate_size,
        config.n_routed_experts,
    )
    store = Store.FP4 if config.expert_dtype == "fp4" else Store.FP8_F32
    found = [_wide(Kind.GATE, experts, hidden)]
    if is_hash:
        table = Tensors(
            kind=Kind.GATE,
            rows=config.vocab_size,
            cols=config.num_experts_per_tok,
            active=0,
            store=Store.I64,
            is_parameter=False,
        )
        found.append(table)
    else:
        found.append(Tensors(kind=Kind.GATE, rows=1, cols=experts, store=Store.F32))
    for count, (rows, cols) in ((2, (inner, hidden)), (1, (hidden, inner))):
        found.append(_times(_matrix(Kind.SHARED, rows, cols), count))
        routed = replace(_matrix(Kind.ROUTED, rows, cols), store=store)
        active = count * config.num_experts_per_tok
        found.append(replace(routed, count=count * experts, active=active))
    return found


def _draft(config: V4Config) -> list[Tensors]:
    """The `mtp.*` blocks; they share embedding and head with the target."""
    stages, hidden = config.draft_stages, config.hidden_size
    if stages == 0:
        return []
    found = [_times(t, stages) for t in _layer(config, 0, is_hash=False)]
    if not config.is_dspark:
        joint = [_times(_matrix(Kind.DRAFT, hidden, hidden), 2), *_stream_head(config)]
        return found + [_times(t, stages) for t in (*joint, *_norms(hidden, hidden, hidden))]
    rank = config.dspark_markov_rank
    return [
        *found,
        _matrix(Kind.DRAFT, hidden, len(config.dspark_target_layer_ids) * hidden),
        *_norms(hidden, hidden),  # of the projected target states, of the head
        *_stream_head(config),
        Tensors(kind=Kind.DRAFT, rows=config.vocab_size, cols=rank, count=2),  # Markov head
        Tensors(kind=Kind.DRAFT, rows=1, cols=hidden + rank),  # confidence
    ]
