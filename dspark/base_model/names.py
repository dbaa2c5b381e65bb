"""Names, shapes and storage of every tensor of a DeepSeek-V4 checkpoint, in both namings.

Official names have no "model." prefix: `layers.3.attn.wq_a.weight`, its scales
`layers.3.attn.wq_a.scale`. transformers has two namings: that of its modules, with the experts of
a layer stacked, and what `save_pretrained` writes, which is half official. We read both, and write
the names of the modules with experts apart: transformers cannot dequantise stacked ones.

Source: headers of the released checkpoints; transformers 5.23 `conversion_mapping.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from dspark.base_model.config import CSA_RATIO, V4Config

__all__ = [
    "Stack",
    "Storage",
    "TensorSpec",
    "expected_tensors",
    "official_name",
    "parse_stack",
    "stage_count",
    "transformers_name",
]


class Storage(Enum):
    """How the release stores a tensor."""

    FP8 = "fp8"
    """A linear layer: e4m3 with e8m0 scales per 128 x 128 block."""
    EXPERT = "expert"
    """A routed expert: packed FP4 with e8m0 scales, or e4m3 with float32 scales (Base)."""
    BF16 = "bf16"
    F32 = "f32"
    I64 = "i64"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a checkpoint must hold under a name.

    Attributes:
        shape: Of the numbers: [O, I] whatever they are packed in.
        storage: How the release stores them.
    """

    shape: tuple[int, ...]
    storage: Storage


Specs = dict[str, TensorSpec]


def expected_tensors(config: V4Config) -> Specs:
    """Every tensor of a model by official name, without the scales of quantised ones.

    Args:
        config: `draft_stages` says how many `mtp.*` blocks there are; they are DSpark stages if
            `is_dspark`, else MTP-1 modules.
    """
    c = config
    specs: Specs = {
        "embed.weight": TensorSpec((c.vocab_size, c.hidden_size), Storage.BF16),
        "head.weight": TensorSpec((c.vocab_size, c.hidden_size), Storage.BF16),
        "norm.weight": TensorSpec((c.hidden_size,), Storage.BF16),
        **_hc_head(c, ""),
    }
    for layer in range(c.num_hidden_layers):
        specs.update(_block(c, f"layers.{layer}.", c.is_hash_layer(layer)))
        if c.ratio(layer):
            specs.update(_compression(c, f"layers.{layer}.attn.", c.ratio(layer)))
    for stage in range(c.draft_stages):
        prefix = f"mtp.{stage}."
        specs.update(_block(c, prefix, is_hashed=False))
        specs.update(_dspark(c, prefix, stage) if c.is_dspark else _mtp(c, prefix))
    return specs


def _hc_head(c: V4Config, prefix: str) -> Specs:
    return {
        f"{prefix}hc_head_fn": TensorSpec((c.hc_mult, c.hc_mult * c.hidden_size), Storage.F32),
        f"{prefix}hc_head_base": TensorSpec((c.hc_mult,), Storage.F32),
        f"{prefix}hc_head_scale": TensorSpec((1,), Storage.F32),
    }


def _block(c: V4Config, prefix: str, is_hashed: bool) -> Specs:
    """A layer without its compressor: attention, experts, hyper-connections."""
    hidden, heads = c.hidden_size, c.num_attention_heads
    mixes = (2 + c.hc_mult) * c.hc_mult
    specs: Specs = {}
    for half in ("attn", "ffn"):
        specs[f"{prefix}{half}_norm.weight"] = TensorSpec((hidden,), Storage.BF16)
        specs[f"{prefix}hc_{half}_fn"] = TensorSpec((mixes, c.hc_mult * hidden), Storage.F32)
        specs[f"{prefix}hc_{half}_base"] = TensorSpec((mixes,), Storage.F32)
        specs[f"{prefix}hc_{half}_scale"] = TensorSpec((3,), Storage.F32)
    linears = {
        "wq_a": (c.q_lora_rank, hidden),
        "wq_b": (heads * c.head_dim, c.q_lora_rank),
        "wkv": (c.head_dim, hidden),
        "wo_a": (c.o_groups * c.o_lora_rank, heads * c.head_dim // c.o_groups),
        "wo_b": (hidden, c.o_groups * c.o_lora_rank),
    }
    for name, shape in linears.items():
        specs[f"{prefix}attn.{name}.weight"] = TensorSpec(shape, Storage.FP8)
    specs[f"{prefix}attn.attn_sink"] = TensorSpec((heads,), Storage.F32)
    specs[f"{prefix}attn.q_norm.weight"] = TensorSpec((c.q_lora_rank,), Storage.BF16)
    specs[f"{prefix}attn.kv_norm.weight"] = TensorSpec((c.head_dim,), Storage.BF16)
    specs.update(_experts(c, f"{prefix}ffn.", is_hashed))
    return specs


def _experts(c: V4Config, prefix: str, is_hashed: bool) -> Specs:
    wide, narrow = c.hidden_size, c.moe_intermediate_size
    shapes = {"w1": (narrow, wide), "w2": (wide, narrow), "w3": (narrow, wide)}
    specs: Specs = {f"{prefix}gate.weight": TensorSpec((c.n_routed_experts, wide), Storage.BF16)}
    if is_hashed:
        table = (c.vocab_size, c.num_experts_per_tok)
        specs[f"{prefix}gate.tid2eid"] = TensorSpec(table, Storage.I64)
    else:
        specs[f"{prefix}gate.bias"] = TensorSpec((c.n_routed_experts,), Storage.F32)
    for name, shape in shapes.items():
        specs[f"{prefix}shared_experts.{name}.weight"] = TensorSpec(shape, Storage.FP8)
    for expert in range(c.n_routed_experts):
        for name, shape in shapes.items():
            specs[f"{prefix}experts.{expert}.{name}.weight"] = TensorSpec(shape, Storage.EXPERT)
    return specs


def _compression(c: V4Config, prefix: str, ratio: int) -> Specs:
    """The compressor of a CSA or HCA layer, and the indexer of a CSA layer."""
    is_csa = ratio == CSA_RATIO
    specs = _compressor(c, f"{prefix}compressor.", c.head_dim * (2 if is_csa else 1), ratio)
    specs[f"{prefix}compressor.norm.weight"] = TensorSpec((c.head_dim,), Storage.BF16)
    if is_csa:
        size, heads = c.index_head_dim, c.index_n_heads
        index = f"{prefix}indexer."
        specs[f"{index}wq_b.weight"] = TensorSpec((heads * size, c.q_lora_rank), Storage.FP8)
        specs[f"{index}weights_proj.weight"] = TensorSpec((heads, c.hidden_size), Storage.BF16)
        specs.update(_compressor(c, f"{index}compressor.", 2 * size, ratio))
        specs[f"{index}compressor.norm.weight"] = TensorSpec((size,), Storage.BF16)
    return specs


def _compressor(c: V4Config, prefix: str, width: int, ratio: int) -> Specs:
    return {
        f"{prefix}wkv.weight": TensorSpec((width, c.hidden_size), Storage.BF16),
        f"{prefix}wgate.weight": TensorSpec((width, c.hidden_size), Storage.BF16),
        f"{prefix}ape": TensorSpec((ratio, width), Storage.F32),
    }


def _mtp(c: V4Config, prefix: str) -> Specs:
    hidden = c.hidden_size
    specs = {f"{prefix}{n}.weight": TensorSpec((hidden,), Storage.BF16) for n in _MTP_NORMS}
    for name in ("e_proj", "h_proj"):
        specs[f"{prefix}{name}.weight"] = TensorSpec((hidden, hidden), Storage.FP8)
    return {**specs, **_hc_head(c, prefix)}


_MTP_NORMS = ("enorm", "hnorm", "norm")


def _dspark(c: V4Config, prefix: str, stage: int) -> Specs:
    """What the first and the last DSpark stage hold beside their block."""
    hidden, rank = c.hidden_size, c.dspark_markov_rank
    specs: Specs = {}
    if stage == 0:
        width = hidden * len(c.dspark_target_layer_ids)
        specs[f"{prefix}main_proj.weight"] = TensorSpec((hidden, width), Storage.FP8)
        specs[f"{prefix}main_norm.weight"] = TensorSpec((hidden,), Storage.BF16)
    if stage == c.draft_stages - 1:
        specs[f"{prefix}norm.weight"] = TensorSpec((hidden,), Storage.BF16)
        specs.update(_hc_head(c, prefix))
        for name in ("markov_w1", "markov_w2"):
            table = TensorSpec((c.vocab_size, rank), Storage.BF16)
            specs[f"{prefix}markov_head.{name}.weight"] = table
        confidence = TensorSpec((1, hidden + rank), Storage.BF16)
        specs[f"{prefix}confidence_head.proj.weight"] = confidence
    return specs


_TOP = {
    "embed": "model.embed_tokens",
    "head": "lm_head",
    "norm": "model.norm",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"hc_{h}_{p}": f"{h}_hc.{p}" for h in ("attn", "ffn") for p in ("fn", "base", "scale")},
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_norm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.kv_norm": "self_attn.kv_norm",
    "attn.wo_a": "self_attn.o_a_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    "attn.compressor.wkv": "self_attn.compressor.kv_proj",
    "attn.compressor.wgate": "self_attn.compressor.gate_proj",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm": "self_attn.compressor.kv_norm",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj",
    "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.norm": "self_attn.compressor.indexer.kv_norm",
    "ffn.gate": "mlp.gate",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
}
# save_pretrained undoes the renaming of every norm called kv_norm, also of this one.
_LAYER_BACK = {**{theirs: ours for ours, theirs in _LAYER.items()}, "attn.norm": "attn.kv_norm"}
_TOP_BACK = {theirs.removeprefix("model."): ours for ours, theirs in _TOP.items()}
_IN_LAYER = re.compile(r"(layers\.\d+\.)(.+)")
_SUFFIXES = {".weight": ".weight", ".scale": ".weight_scale_inv"}


def official_name(name: str) -> str:
    """The official name of a tensor in a file of any naming; names it does not know as they are.

    Stacked experts are several official tensors: see `parse_stack`.
    """
    bare, suffix = name.removeprefix("model."), ""
    for ours, theirs in _SUFFIXES.items():
        for ending in (theirs, ours):
            if bare.endswith(ending) and not suffix and bare not in _TOP_BACK:
                bare, suffix = bare[: -len(ending)], ours
    found = _IN_LAYER.fullmatch(bare)
    if found is None:
        return _TOP_BACK.get(bare, bare) + suffix
    prefix, tail = found.groups()
    tail = tail.replace("mlp.experts.", "ffn.experts.")
    if tail + suffix in _LAYER_BACK:  # attn_hc.scale is no scale of a weight
        return prefix + _LAYER_BACK[tail + suffix]
    return prefix + _LAYER_BACK.get(tail, tail) + suffix


def transformers_name(name: str) -> str:
    """The name of a tensor in transformers' modules, from the official one.

    `mtp.*` keeps its name, and transformers skips it.
    """
    bare, suffix = name, ""
    for ours, theirs in _SUFFIXES.items():
        if name.endswith(ours):
            bare, suffix = name[: -len(ours)], theirs
    if bare in _TOP:
        return _TOP[bare] + suffix
    found = _IN_LAYER.fullmatch(bare)
    if found is None:
        return name
    prefix, tail = found.groups()
    tail = tail.replace("ffn.experts.", "mlp.experts.") if tail not in _LAYER else _LAYER[tail]
    return f"model.{prefix}{tail}{suffix}"


@dataclass(frozen=True, slots=True)
class Stack:
    """A tensor that holds one matrix, or two, of all experts of a layer.

    Attributes:
        experts: Official prefix, such as "layers.3.ffn.experts".
        matrices: ("w1", "w3") one above the other, or ("w2",).
        suffix: ".weight" or ".scale".
    """

    experts: str
    matrices: tuple[str, ...]
    suffix: str


_STACKED = re.compile(
    r"(?:model\.)?(layers\.\d+)\.mlp\.experts\.(gate_up_proj|down_proj)(_scale_inv)?"
)


def parse_stack(name: str) -> Stack | None:
    """Read a transformers name of stacked experts, or None if it is not one."""
    found = _STACKED.fullmatch(name)
    if found is None:
        return None
    layer, which, scale = found.groups()
    matrices = ("w1", "w3") if which == "gate_up_proj" else ("w2",)
    return Stack(f"{layer}.ffn.experts", matrices, ".scale" if scale else ".weight")


def stage_count(names: list[str]) -> int:
    """Draft stages that tensors belong to: config.json says 1 also where there are three."""
    stages = [int(name.split(".")[1]) for name in names if re.match(r"mtp\.\d+\.", name)]
    return max(stages, default=-1) + 1
