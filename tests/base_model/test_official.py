"""Where the released code and transformers differ, in bfloat16, we do as the released code does.

Every test computes a part of the model three times: ours, as the released code does it, and as
transformers does it (its own classes where they can be run alone). Ours must be the first, and the
second must be so far off that taking it for ours would fail. Three places where we compute wider
than both are at the end. Source: the comparison of both codes, item by item.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

from dspark.base_model.attention import Attention, attend
from dspark.base_model.compressor import Compressor
from dspark.base_model.expert_store import DictExperts
from dspark.base_model.fp8 import act_quant
from dspark.base_model.hyper import Mix
from dspark.base_model.indexer import Indexer
from dspark.base_model.model import V4Model
from dspark.base_model.moe import Router
from dspark.base_model.numerics import rms_norm
from dspark.base_model.presets import preset
from dspark.base_model.quantsim import round_rows
from dspark.base_model.random_weights import random_tensors
from dspark.base_model.rotary import Rotation
from dspark.base_model.step import SlotEntries
from dspark.base_model.weights import DictSource
from tests.base_model.build import open_slot, run

pytestmark = pytest.mark.usefixtures("_inference")

CONFIG = preset("v4-tiny")
BF16 = torch.bfloat16
EPS = CONFIG.rms_norm_eps


@pytest.fixture
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@functools.cache
def weights(*, quantised: bool = False) -> dict[str, Tensor]:
    return dict(random_tensors(CONFIG, seed=7, quantised=quantised))


@functools.cache
def model(*, quantised: bool = False, fake_quant: bool = False) -> V4Model:
    tensors = weights(quantised=quantised)
    source, experts = DictSource(tensors), DictExperts(tensors)
    return V4Model(CONFIG, source, experts, dtype=BF16, fake_quant=fake_quant)


@functools.cache
def their_config() -> DeepseekV4Config:
    values = CONFIG.to_transformers()
    known = {k: v for k, v in values.items() if k not in ("architectures", "model_type")}
    config = DeepseekV4Config(**known)
    config._experts_implementation = "eager"
    return config


def rows(count: int, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(count, *shape, generator=gen) * scale).to(BF16)


def wide(name: str) -> Tensor:
    return weights()[name].float()


def agreement(a: Tensor, b: Tensor) -> float:
    """Share of numbers that are the same."""
    assert a.shape == b.shape
    return float((a == b).float().mean())


def assert_official(ours: Tensor, official: Tensor, others: Tensor, *, far: float = 0.9) -> None:
    """Ours is the official result but for sums in another order; the other way is not."""
    assert ours.dtype == official.dtype
    assert agreement(ours, official) > 0.995
    assert agreement(official, others.to(official.dtype)) < far


class Fixed(torch.nn.Module):
    """Gives the same whatever it is asked."""

    def __init__(self, *values: Any) -> None:
        super().__init__()
        self.values = values if len(values) > 1 else values[0]

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.values


# -- rotary tables ---------------------------------------------------------------------------------


def turned(x: Tensor, positions: Tensor, theta: Tensor, cast: Callable[[Tensor], Tensor]) -> Tensor:
    """Complex rotation of the last dims, tables through `cast`."""
    r = 2 * len(theta)
    angle = positions.float()[:, None] * theta
    table = torch.complex(cast(angle.cos()).float(), cast(angle.sin()).float())
    pairs = torch.view_as_complex(x[..., -r:].float().unflatten(-1, (-1, 2)).contiguous())
    table = table[:, None] if x.dim() == 3 else table
    return torch.cat((x[..., :-r], torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)), -1)


@pytest.mark.parametrize("layer", [0, 1], ids=["main", "compress"])
def test_rotary_tables_are_float32(layer: int) -> None:
    is_compressed = CONFIG.ratio(layer) > 0
    attention, theta = model().blocks[layer].attention, model()._theta[is_compressed]
    positions = torch.arange(3000, 3064)
    x = rows(64, CONFIG.hidden_size)
    name = f"layers.{layer}.attn"
    keys = (x.float() @ wide(f"{name}.wkv.weight").T).to(BF16)
    keys = rms_norm(keys, wide(f"{name}.kv_norm.weight"), EPS, torch.float32)
    rotary = theirs.DeepseekV4RotaryEmbedding(their_config())
    table = rotary(keys, positions[None], layer_type="compress" if is_compressed else "main")
    others = theirs.apply_rotary_pos_emb(keys[None, None], *table)[0, 0]
    r = CONFIG.qk_rope_head_dim
    ours = attention.keys(x, Rotation.at(positions, theta))[:, -r:]
    official = turned(keys, positions, theta, lambda t: t)[:, -r:]
    assert_official(ours, official, others[:, -r:])
    # It is the dtype of the tables that makes the difference.
    assert (
        agreement(turned(keys, positions, theta, lambda t: t.to(BF16))[:, -r:], others[:, -r:]) == 1
    )


# -- hyper-connections -----------------------------------------------------------------------------


def test_streams_are_mixed_in_float32_and_rounded_once() -> None:
    hyper = model().blocks[1]._attention_streams
    streams = rows(64, CONFIG.hc_mult, CONFIG.hidden_size)
    output = rows(64, CONFIG.hidden_size, seed=1)
    _, mix = hyper.read(streams)
    assert mix.post.dtype == mix.comb.dtype == torch.float32

    def mixed(dtype: torch.dtype) -> Tensor:
        post, comb = mix.post.to(dtype), mix.comb.to(dtype)
        kept = torch.matmul(comb.transpose(-1, -2), streams.to(dtype))
        return post[..., None] * output.to(dtype)[:, None] + kept

    ours = hyper.write(output, streams, mix)
    assert_official(ours, mixed(torch.float32).to(BF16), their_layer(streams, output, mix))
    assert agreement(mixed(BF16), their_layer(streams, output, mix)) == 1


def their_layer(streams: Tensor, output: Tensor, mix: Mix) -> Tensor:
    """transformers' decoder layer with everything but the mixing of the first half taken out."""

    layer = theirs.DeepseekV4DecoderLayer(their_config(), 0)
    layer.attn_hc = Fixed(mix.post[None], mix.comb[None], output[None])
    layer.self_attn = Fixed(output[None], None)
    layer.mlp = Fixed(torch.zeros_like(output)[None])
    layer.input_layernorm = layer.post_attention_layernorm = torch.nn.Identity()
    unit = torch.eye(CONFIG.hc_mult).expand(1, len(streams), -1, -1)
    layer.ffn_hc = Fixed(torch.zeros_like(mix.post)[None], unit, output[None])
    return layer(streams[None])[0]


# -- router and experts ----------------------------------------------------------------------------


def their_router(dtype: torch.dtype) -> theirs.DeepseekV4TopKRouter:
    router = theirs.DeepseekV4TopKRouter(their_config())
    router.weight.data = weights()["layers.3.ffn.gate.weight"].to(dtype)
    router.e_score_correction_bias.data = weights()["layers.3.ffn.gate.bias"]
    return router


def test_gate_scores_are_float32() -> None:
    x = rows(256, CONFIG.hidden_size)
    ids = torch.zeros(256, dtype=torch.int64)
    chosen, routing = model().blocks[3].experts._router(x, ids)
    scores = F.softplus(x.float() @ wide("layers.3.ffn.gate.weight").T).sqrt()
    biased = scores + weights()["layers.3.ffn.gate.bias"]
    official = scores.gather(1, biased.topk(CONFIG.num_experts_per_tok).indices)
    official = official / official.sum(-1, keepdim=True) * CONFIG.routed_scaling_factor
    assert routing.dtype == torch.float32
    torch.testing.assert_close(routing, official)
    with torch.no_grad():
        _, others, _ = their_router(BF16)(x)
    off = (others.float().sort(-1).values - official.sort(-1).values).abs()
    assert float((off > 1e-4).float().mean()) > 0.5
    assert torch.equal(
        chosen, biased.sort(descending=True, stable=True).indices[:, : chosen.shape[1]]
    )


def test_the_norm_of_gate_weights_has_no_epsilon() -> None:
    """Shows where every score is next to nothing: softplus(-85) under the root is 3.5e-19."""
    gate = torch.full((CONFIG.n_routed_experts, CONFIG.hidden_size), -1.0)
    x = torch.full((1, CONFIG.hidden_size), 85 / CONFIG.hidden_size)
    tensors = {"gate.weight": gate, "gate.bias": torch.zeros(CONFIG.n_routed_experts)}
    router = Router(DictSource(tensors), "gate", CONFIG, model().numerics, 3)
    _, routing = router(x, torch.zeros(1, dtype=torch.int64))
    assert float(routing.sum()) == pytest.approx(CONFIG.routed_scaling_factor, rel=1e-6)
    other = their_router(torch.float32)
    other.weight.data = gate
    with torch.no_grad():
        _, others, _ = other(x)
    assert float(others.sum()) < 0.99 * CONFIG.routed_scaling_factor


def experts_by_hand(
    x: Tensor, chosen: Tensor, routing: Tensor, *, late: bool, narrow: bool
) -> Tensor:
    """Routed and shared experts; `late`: weigh behind w2; `narrow`: add up in bfloat16."""
    out = torch.zeros(x.shape, dtype=BF16 if narrow else torch.float32)

    def linear(name: str, y: Tensor) -> Tensor:
        return (y.float() @ wide(f"layers.3.ffn.{name}.weight").T).to(BF16)

    def expert(name: str, y: Tensor, weight: Tensor | None) -> Tensor:
        gate = linear(f"{name}.w1", y).float().clamp(max=CONFIG.swiglu_limit)
        up = linear(f"{name}.w3", y).float().clamp(-CONFIG.swiglu_limit, CONFIG.swiglu_limit)
        inner = F.silu(gate) * up
        if weight is None:
            return linear(f"{name}.w2", inner.to(BF16))
        if late:
            return (linear(f"{name}.w2", inner.to(BF16)).float() * weight).to(BF16)
        return linear(f"{name}.w2", (inner * weight).to(BF16))

    for e in range(CONFIG.n_routed_experts):
        row, place = torch.where(chosen == e)
        y = expert(f"experts.{e}", x[row], routing[row, place, None])
        out.index_add_(0, row, y.to(out.dtype))
    return (out + expert("shared_experts", x, None).to(out.dtype)).to(BF16)


def test_routing_weights_come_before_w2_and_experts_add_up_in_float32() -> None:
    x = rows(64, CONFIG.hidden_size)
    moe, ids = model().blocks[3].experts, torch.zeros(64, dtype=torch.int64)
    chosen, routing = moe._router(x, ids)
    ours = moe(x, ids)
    official = experts_by_hand(x, chosen, routing, late=False, narrow=False)
    for late, narrow in ((True, False), (False, True), (True, True)):
        others = experts_by_hand(x, chosen, routing, late=late, narrow=narrow)
        assert_official(ours, official, others)
    assert agreement(official, their_experts(x)) < 0.9


def their_experts(x: Tensor) -> Tensor:
    block = theirs.DeepseekV4SparseMoeBlock(their_config(), 3).to(BF16)
    w, prefix = weights(), "layers.3.ffn"
    block.gate = their_router(BF16)
    both = [
        torch.cat([w[f"{prefix}.experts.{e}.{m}.weight"] for m in ("w1", "w3")])
        for e in range(CONFIG.n_routed_experts)
    ]
    down = [w[f"{prefix}.experts.{e}.w2.weight"] for e in range(CONFIG.n_routed_experts)]
    block.experts.gate_up_proj.data, block.experts.down_proj.data = map(torch.stack, (both, down))
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for name, official in names.items():
        part = getattr(block.shared_experts, name)
        part.weight.data = w[f"{prefix}.shared_experts.{official}.weight"]
    with torch.no_grad():
        return block(x[None])[0]


# -- compressors -----------------------------------------------------------------------------------


def their_compressor(x: Tensor, layer: int) -> Tensor:
    """Entries of rows at positions 0 .. n - 1."""
    is_sparse = CONFIG.ratio(layer) == 4
    kind = theirs.DeepseekV4CSACompressor if is_sparse else theirs.DeepseekV4HCACompressor
    part, prefix = kind(their_config()).to(BF16), f"layers.{layer}.attn.compressor"
    part.kv_proj.weight.data = weights()[f"{prefix}.wkv.weight"]
    part.gate_proj.weight.data = weights()[f"{prefix}.wgate.weight"]
    part.position_bias.data = wide(f"{prefix}.ape")
    part.kv_norm.weight.data = wide(f"{prefix}.norm.weight")
    # The cast above rounded the frequencies too, which from_pretrained does not.
    part.rotary_emb = theirs.DeepseekV4RotaryEmbedding(their_config())
    if is_sparse:
        part.indexer = Fixed(torch.zeros(1, len(x), 1, dtype=torch.int64))
    latent, positions = torch.zeros(1, len(x), CONFIG.q_lora_rank, dtype=BF16), torch.arange(len(x))
    with torch.no_grad():
        return part(x[None], latent, positions[None], None, layer)[0][0, 0]


def pooled(compressor: Compressor, x: Tensor, layer: int) -> Tensor:
    """Our entries of the same rows."""
    m = CONFIG.ratio(layer)
    count, reach = len(x) // m, 2 * m if m == 4 else m
    wanted = torch.arange(1, count + 1)[:, None] * m + torch.arange(-reach, 0)
    raw = compressor.project(x)[wanted.clamp(min=0)]
    rotation = Rotation.at(torch.arange(count) * m, model()._theta[1])
    return compressor.pool(raw, wanted >= 0, rotation)


def official_entries(x: Tensor, layer: int, dtype: torch.dtype) -> Tensor:
    """Entries with projections and pooling in a dtype."""
    m, d, prefix = CONFIG.ratio(layer), CONFIG.head_dim, f"layers.{layer}.attn.compressor"
    value, gate = (
        (x.float() @ wide(f"{prefix}.{name}.weight").T).to(dtype) for name in ("wkv", "wgate")
    )
    gate = gate + wide(f"{prefix}.ape").repeat(len(x) // m, 1)
    entries = []
    for w in range(len(x) // m):
        v, g = value[m * w : m * w + m], gate[m * w : m * w + m]
        if m == 4:
            v, g = v[:, d:], g[:, d:]
            if w:
                before = slice(m * w - m, m * w)
                v, g = torch.cat((value[before, :d], v)), torch.cat((gate[before, :d], g))
        weight = g.softmax(0, dtype=torch.float32).to(dtype)
        entries.append((v * weight).sum(0).to(BF16))
    entry = rms_norm(torch.stack(entries), wide(f"{prefix}.norm.weight"), EPS, torch.float32)
    return turned(entry, torch.arange(len(entries)) * m, model()._theta[1], lambda t: t)


@pytest.mark.parametrize("layer", [1, 2], ids=["CSA", "HCA"])
def test_compressors_project_and_pool_in_float32(layer: int) -> None:
    compressor = model().blocks[layer].attention.compressor
    assert compressor is not None
    x = rows(64, CONFIG.hidden_size)
    plain = (
        CONFIG.head_dim - CONFIG.qk_rope_head_dim
    )  # what RoPE leaves alone: its tables differ too
    ours = pooled(compressor, x, layer)
    official = official_entries(x, layer, torch.float32)
    assert compressor.project(x).dtype == torch.float32
    assert agreement(ours, official) > 0.995
    assert_official(ours[:, :plain], official[:, :plain], their_compressor(x, layer)[:, :plain])
    narrow = official_entries(x, layer, BF16)[:, :plain]
    assert agreement(narrow, their_compressor(x, layer)[:, :plain]) > 0.95


def test_raw_rows_are_kept_in_float32() -> None:
    cache = model().new_cache()
    for lane in cache.lanes.values():
        layer = CONFIG.compress_ratios.index(lane.ratio)
        assert lane.raw.layer(layer, "entry").dtype == torch.float32
        assert lane.entries.layer(layer, "entry").dtype == BF16


# -- head ------------------------------------------------------------------------------------------


def test_logits_are_float32() -> None:
    cache = model().new_cache()
    logits = run(model(), cache, open_slot(cache), [5, 6, 7])
    hidden = rows(64, CONFIG.hidden_size)
    ours = model().head(hidden)
    official = hidden.float() @ wide("head.weight").T
    assert logits.dtype == ours.dtype == torch.float32
    torch.testing.assert_close(ours, official)
    others = F.linear(hidden, weights()["head.weight"])
    assert float((others.float() - official).abs().max()) > 1e-3
    # What comes out of the whole model is not rounded on the way either.
    assert agreement(logits, logits.to(BF16).float()) < 0.1


# -- simulated quantisation ------------------------------------------------------------------------


def test_activations_are_quantised_only_if_asked_for() -> None:
    x, positions = rows(64, CONFIG.hidden_size), torch.arange(64)
    rotation = Rotation.at(positions, model()._theta[0])
    name = "layers.0.attn"
    stored = DictSource(weights(quantised=True)).stored(f"{name}.wkv").dequantise(torch.float32)
    norm = weights(quantised=True)[f"{name}.kv_norm.weight"].float()

    def keys(y: Tensor) -> Tensor:
        return rotation.apply(rms_norm((y.float() @ stored.T).to(BF16), norm, EPS, torch.float32))

    plain, rounded = keys(x), round_rows(keys(act_quant(x)), CONFIG.qk_rope_head_dim)
    attentions = [model(quantised=True, fake_quant=q).blocks[0].attention for q in (False, True)]
    assert_official(attentions[0].keys(x, rotation), plain, rounded)
    assert_official(attentions[1].keys(x, rotation), rounded, plain)


# -- wider than both -------------------------------------------------------------------------------
# The released code rounds here where transformers does not, or elsewhere. We round in neither
# place: a difference of noise, and of which entry wins where two are next to equal.


def test_the_norm_of_query_heads_is_rounded_once() -> None:
    """Released: square and mean in bfloat16. transformers: the factor and the product."""
    attention: Attention = model().blocks[0].attention
    x, positions = rows(64, CONFIG.hidden_size), torch.zeros(64, dtype=torch.int64)
    latent, ours = attention.queries(x, Rotation.at(positions, model()._theta[0]))
    query = (latent.float() @ wide("layers.0.attn.wq_b.weight").T).to(BF16)
    query = query.unflatten(-1, (-1, CONFIG.head_dim))
    once = rms_norm(query.float(), None, EPS, torch.float32).to(BF16)
    released = query * torch.rsqrt(query.square().mean(-1, keepdim=True) + EPS)
    others = theirs.DeepseekV4UnweightedRMSNorm(eps=EPS)(query)
    assert agreement(ours, once) > 0.995
    assert agreement(released, once) < 0.9
    assert agreement(others, once) < 0.9


def test_indexer_scores_are_float32_as_in_transformers() -> None:
    """Released: products and weights in bfloat16. The order of near-equal entries may differ."""
    indexer: Indexer | None = model().blocks[1].attention.indexer
    assert indexer is not None
    h, d = CONFIG.index_n_heads, CONFIG.index_head_dim
    query, keys = rows(32, h, d), rows(40, d, seed=1)
    factors = rows(32, h, seed=2).float() * (h * d) ** -0.5
    everything = SlotEntries(0, 32, torch.arange(40), 40, torch.ones(32, 0, dtype=torch.bool))
    ours = indexer._scores(query, factors, keys, everything)
    score = torch.einsum("nhd,ed->nhe", query.float(), keys.float()).relu()
    torch.testing.assert_close(ours, (score * factors[..., None]).sum(1))
    narrow = torch.einsum("nhd,ed->nhe", query, keys).relu() * factors.to(BF16)[..., None]
    assert float((narrow.sum(1).float() - ours).abs().max()) > 1e-3


def test_attention_is_float32_inside() -> None:
    """Released: logits in float32, probabilities rounded. transformers: products in bfloat16."""
    h, c = CONFIG.num_attention_heads, CONFIG.head_dim
    query, keys, sink = rows(32, h, c), rows(24, c, seed=1), torch.zeros(h)
    seen = torch.ones(32, 24, dtype=torch.bool)
    index = torch.arange(24).expand(32, 24)
    ours = attend(query, [(keys, index, seen)], sink, model().numerics)

    def by_hand(dtype: torch.dtype) -> Tensor:
        logits = torch.einsum("nhc,ec->nhe", query.to(dtype), keys.to(dtype)) * c**-0.5
        both = torch.cat((logits, sink.to(dtype).expand(32, h)[..., None]), -1)
        return torch.einsum("nhe,ec->nhc", both.softmax(-1)[..., :-1], keys.to(dtype)).to(BF16)

    assert_official(ours, by_hand(torch.float32), by_hand(BF16))
