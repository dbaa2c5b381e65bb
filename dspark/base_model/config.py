"""Configuration of a DeepSeek-V4 model: fields, checks, both config.json dialects.

Field names are those of the official config.json. The transformers dialect differs in where rotary
and layer settings live (`rope_parameters`, `layer_types`); `V4Config.from_dict` reads either.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from dspark.errors import ConfigError

__all__ = ["CSA_RATIO", "LayerKind", "V4Config"]

CSA_RATIO = 4
"""The compression rate that means compressed sparse attention: overlapping windows, an indexer."""


class LayerKind(Enum):
    """What a decoder layer attends to beside its sliding window."""

    SLIDING = "sliding_attention"
    CSA = "compressed_sparse_attention"
    HCA = "heavily_compressed_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class V4Config:
    """Shape of a DeepSeek-V4 model.

    Attributes:
        vocab_size: V.
        hidden_size: D.
        num_hidden_layers: Decoder layers.
        num_attention_heads: H query heads; keys and values have one head that serves as both.
        head_dim: c, size of a head.
        qk_rope_head_dim: r, the last r dims of a head are rotated; even.
        q_lora_rank: Width of the query's low-rank latent.
        o_lora_rank: Width of a group's output latent.
        o_groups: Groups that the heads' outputs are projected in.
        sliding_window: Positions a query sees directly, itself included.
        compress_ratios: One per decoder layer: 0 sliding window only, 4 CSA, any other rate HCA.
        rope_theta: Rotary base of layers without compression.
        compress_rope_theta: Rotary base of layers with compression, under YaRN.
        rope_factor: YaRN factor; 1 switches YaRN off.
        rope_original: Positions the model was trained for before YaRN.
        rope_beta_fast: YaRN: rotations over which a dim keeps its frequency.
        rope_beta_slow: YaRN: rotations under which a dim is fully interpolated.
        max_position_embeddings: Longest context in tokens.
        index_n_heads: Heads of the indexer.
        index_head_dim: Size of an indexer head.
        index_topk: Compressed entries a CSA query attends to at most.
        n_routed_experts: Experts of a layer.
        n_shared_experts: Experts every token goes through (1).
        num_experts_per_tok: Routed experts a token goes through.
        moe_intermediate_size: Inner width of an expert.
        num_hash_layers: First layers, whose experts are chosen by token id.
        routed_scaling_factor: Factor on the routing weights.
        swiglu_limit: Clamp inside the experts; 0 for none.
        hc_mult: N residual streams of the hyper-connections.
        hc_sinkhorn_iters: Sinkhorn iterations.
        hc_eps: Epsilon inside them.
        rms_norm_eps: Epsilon of every RMS norm.
        bos_token_id: Begins a text.
        eos_token_id: Ends a text.
        expert_dtype: "fp4" or "fp8": what the released experts are stored in. What a file really
            holds is decided by its tensors.
        draft_stages: `mtp.*` blocks in the checkpoint: 1 for MTP-1, 3 for DSpark, 0 for none.
        dspark_block_size: Anchor and noise tokens of a DSpark draft block, 0 without DSpark.
        dspark_noise_token_id: Token id of the noise slots.
        dspark_target_layer_ids: Layers whose output the DSpark module reads.
        dspark_markov_rank: Rank of its Markov head.

    Raises:
        ConfigError: If a field is out of range or two contradict each other; it names the field.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    compress_ratios: tuple[int, ...]
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    sliding_window: int = 128
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_factor: float = 16.0
    rope_original: int = 65536
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    max_position_embeddings: int = 1048576
    n_shared_experts: int = 1
    num_hash_layers: int = 3
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    bos_token_id: int = 0
    eos_token_id: int = 1
    expert_dtype: str = "fp4"
    draft_stages: int = 0
    dspark_block_size: int = 0
    dspark_noise_token_id: int = 0
    dspark_target_layer_ids: tuple[int, ...] = ()
    dspark_markov_rank: int = 0

    def __post_init__(self) -> None:
        _check_ranges(self)
        _check_shapes(self)
        _check_draft(self)

    def layer_kind(self, layer: int) -> LayerKind:
        """Kind of decoder layer `layer`; the draft stages behind the last one are SLIDING."""
        ratio = self.ratio(layer)
        if ratio == 0:
            return LayerKind.SLIDING
        return LayerKind.CSA if ratio == CSA_RATIO else LayerKind.HCA

    def ratio(self, layer: int) -> int:
        """Positions that one compressed entry of a layer stands for, 0 without compression."""
        return self.compress_ratios[layer] if layer < self.num_hidden_layers else 0

    def is_hash_layer(self, layer: int) -> bool:
        """True if the layer's experts are chosen by token id."""
        return layer < self.num_hash_layers

    @property
    def is_dspark(self) -> bool:
        """True if the `mtp.*` blocks are a DSpark module."""
        return self.dspark_block_size > 0

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> V4Config:
        """Read a config.json of either dialect.

        Args:
            raw: The JSON object: official, or written by transformers.

        Raises:
            ConfigError: If a field is missing, of the wrong type, or inconsistent.
        """
        values = _flat(raw)
        wanted = {f.name: f for f in fields(V4Config)}
        missing = [name for name in _REQUIRED if values.get(name) is None]
        if missing:
            near = difflib.get_close_matches(missing[0], list(raw), n=1)
            raise ConfigError(
                f"the model's config lacks {', '.join(missing)}.",
                hint=f"did it mean {near[0]}?" if near else None,
            )
        known = {name: values[name] for name in wanted if values.get(name) is not None}
        return V4Config(**{name: _typed(name, value) for name, value in known.items()})

    def to_official(self) -> dict[str, Any]:
        """The official config.json."""
        out: dict[str, Any] = {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            **{f.name: _plain(getattr(self, f.name)) for f in fields(self)},
            "num_key_value_heads": 1,
            "rope_scaling": {
                "type": "yarn",
                "factor": self.rope_factor,
                "original_max_position_embeddings": self.rope_original,
                "beta_fast": self.rope_beta_fast,
                "beta_slow": self.rope_beta_slow,
            },
            "compress_ratios": [*self.compress_ratios, *[0] * self.draft_stages],
            "num_nextn_predict_layers": min(self.draft_stages, 1),
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        dropped = [name for name in out if name.startswith("rope_") and name not in _OFFICIAL_ROPE]
        dropped += ["draft_stages"]
        if not self.is_dspark:
            dropped += [name for name in out if name.startswith("dspark_")]
        return {name: value for name, value in out.items() if name not in dropped}

    def to_transformers(self) -> dict[str, Any]:
        """The config.json that transformers' DeepseekV4Config reads."""
        rates = {
            LayerKind.CSA.value: CSA_RATIO,
            LayerKind.HCA.value: next(
                (m for m in self.compress_ratios if m not in (0, CSA_RATIO)), 128
            ),
        }
        out = self.to_official()
        for name in ("compress_ratios", "rope_scaling"):
            del out[name]
        out["layer_types"] = [self.layer_kind(i).value for i in range(self.num_hidden_layers)]
        out["mlp_layer_types"] = [
            "hash_moe" if self.is_hash_layer(i) else "moe" for i in range(self.num_hidden_layers)
        ]
        out["compress_rates"] = rates
        partial = self.qk_rope_head_dim / self.head_dim
        out["partial_rotary_factor"] = partial
        out["rope_parameters"] = {
            "main": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": partial,
            },
            "compress": {
                "rope_type": "yarn",
                "rope_theta": self.compress_rope_theta,
                "partial_rotary_factor": partial,
                "factor": self.rope_factor,
                "original_max_position_embeddings": self.rope_original,
                "beta_fast": self.rope_beta_fast,
                "beta_slow": self.rope_beta_slow,
                "attention_factor": 1.0,
            },
        }
        return out


_REQUIRED = tuple(
    f.name for f in fields(V4Config) if f.default.__class__.__name__ == "_MISSING_TYPE"
)
_OFFICIAL_ROPE = ("rope_theta", "rope_scaling")
_ZERO_ALLOWED = {
    "bos_token_id",
    "eos_token_id",
    "draft_stages",
    "dspark_block_size",
    "dspark_noise_token_id",
    "dspark_markov_rank",
    "num_hash_layers",
    "swiglu_limit",
}
_TUPLES = ("compress_ratios", "dspark_target_layer_ids")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _typed(name: str, value: Any) -> Any:
    """Check a JSON value's type against the field's, so that "64" or 1.5 heads are refused."""
    default = next(f for f in fields(V4Config) if f.name == name).default
    if name in _TUPLES:
        if not isinstance(value, (list, tuple)) or any(type(x) is not int for x in value):
            raise ConfigError(f"{name} is {value!r}, but must be a list of integers.")
        return tuple(value)
    kind: type = float if isinstance(default, float) else str if isinstance(default, str) else int
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} is {value!r}, but must be of type {kind.__name__}.")
    return value


def _flat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Bring either dialect to our field names."""
    values = dict(raw)
    parameters = raw.get("rope_parameters") or {}
    compress = _mapping("rope_parameters.compress", parameters.get("compress"))
    main = _mapping("rope_parameters.main", parameters.get("main"))
    scaling = _mapping("rope_scaling", raw.get("rope_scaling")) or compress
    values.setdefault("rope_theta", main.get("rope_theta"))
    values.setdefault("compress_rope_theta", compress.get("rope_theta"))
    # Without a scaling block the context was not extended.
    values["rope_factor"] = scaling.get("factor") if scaling else 1.0
    values["rope_original"] = scaling.get("original_max_position_embeddings")
    values["rope_beta_fast"] = scaling.get("beta_fast")
    values["rope_beta_slow"] = scaling.get("beta_slow")
    if values.get("qk_rope_head_dim") is None and values.get("partial_rotary_factor") is not None:
        values["qk_rope_head_dim"] = round(values["partial_rotary_factor"] * values["head_dim"])
    quantization = raw.get("quantization_config")
    if isinstance(quantization, Mapping) and values.get("expert_dtype") is None:
        values["expert_dtype"] = quantization.get("expert_dtype")
    _flatten_layers(raw, values)
    if isinstance(values.get("eos_token_id"), list) and values["eos_token_id"]:
        values["eos_token_id"] = values["eos_token_id"][0]
    return values


def _flatten_layers(raw: Mapping[str, Any], values: dict[str, Any]) -> None:
    layers = raw.get("num_hidden_layers")
    if type(layers) is not int:
        return
    ratios, kinds = raw.get("compress_ratios"), raw.get("layer_types")
    if kinds is not None:
        rates = {"sliding_attention": 0, **(raw.get("compress_rates") or {})}
        unknown = [kind for kind in kinds if kind not in rates]
        if unknown:
            raise ConfigError(
                f"layer_types holds {unknown[0]!r}, but compress_rates names {sorted(rates)}."
            )
        values["compress_ratios"] = [rates[kind] for kind in kinds]
    elif isinstance(ratios, (list, tuple)) and len(ratios) >= layers:
        # The entries behind the decoder layers are the draft stages (0 each).
        stages = len(ratios) - layers
        declared = raw.get("num_nextn_predict_layers")
        values["compress_ratios"] = list(ratios[:layers])
        values.setdefault("draft_stages", stages if stages or declared is None else 0)
    hashed = raw.get("mlp_layer_types")
    if hashed is not None and values.get("num_hash_layers") is None:
        values["num_hash_layers"] = sum(kind == "hash_moe" for kind in hashed)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}, but must be an object.")
    return value


def _check_ranges(config: V4Config) -> None:
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, (int, float)) and not (
            value > 0 or (value == 0 and f.name in _ZERO_ALLOWED)
        ):
            least = ">= 0" if f.name in _ZERO_ALLOWED else "> 0"
            raise ConfigError(f"{f.name} is {value}, but must be {least}.")
    if config.expert_dtype not in ("fp4", "fp8"):
        raise ConfigError(f"expert_dtype is {config.expert_dtype!r}, but must be 'fp4' or 'fp8'.")


def _check_shapes(config: V4Config) -> None:
    c = config
    problems = {
        f"compress_ratios has {len(c.compress_ratios)} entries for num_hidden_layers "
        f"{c.num_hidden_layers}": len(c.compress_ratios) == c.num_hidden_layers,
        f"compress_ratios {list(c.compress_ratios)} holds a negative rate": min(
            c.compress_ratios, default=0
        )
        >= 0,
        f"qk_rope_head_dim {c.qk_rope_head_dim} must be even and at most head_dim {c.head_dim} "
        f"and index_head_dim {c.index_head_dim}": c.qk_rope_head_dim % 2 == 0
        and c.qk_rope_head_dim <= min(c.head_dim, c.index_head_dim),
        f"num_attention_heads {c.num_attention_heads} is not a multiple of o_groups "
        f"{c.o_groups}": c.num_attention_heads % c.o_groups == 0,
        f"num_experts_per_tok {c.num_experts_per_tok} is more than n_routed_experts "
        f"{c.n_routed_experts}": c.num_experts_per_tok <= c.n_routed_experts,
        f"num_hash_layers {c.num_hash_layers} is more than num_hidden_layers "
        f"{c.num_hidden_layers}": c.num_hash_layers <= c.num_hidden_layers,
        f"n_shared_experts {c.n_shared_experts} must be 1": c.n_shared_experts == 1,
        f"eos_token_id {c.eos_token_id} or bos_token_id {c.bos_token_id} is not under vocab_size "
        f"{c.vocab_size}": max(c.eos_token_id, c.bos_token_id) < c.vocab_size,
    }
    for text, holds in problems.items():
        if not holds:
            raise ConfigError(f"the model's config contradicts itself: {text}.")


def _check_draft(config: V4Config) -> None:
    if not config.is_dspark:
        return
    layers = config.dspark_target_layer_ids
    if not layers or not all(0 <= layer < config.num_hidden_layers for layer in layers):
        raise ConfigError(
            f"dspark_target_layer_ids is {list(layers)}, but must name layers 0 to "
            f"{config.num_hidden_layers - 1}."
        )
    if config.dspark_noise_token_id >= config.vocab_size:
        raise ConfigError(
            f"dspark_noise_token_id is {config.dspark_noise_token_id}, but the vocabulary has "
            f"{config.vocab_size} tokens."
        )
    if config.dspark_markov_rank <= 0:
        raise ConfigError("dspark_markov_rank is 0, but a DSpark module needs a Markov head.")
