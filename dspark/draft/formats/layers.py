"""Decoder layers as transformers' configs describe them, to and from `BackboneConfig`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dspark.draft.dspark_config import BackboneConfig, Window
from dspark.draft.formats.fields import Fields
from dspark.errors import CheckpointError

__all__ = ["MakeWindow", "dump_layers", "read_layers", "read_windows"]

FULL, SLIDING = "full_attention", "sliding_attention"

MakeWindow = Callable[[int], Window]
"""The layout's reading of a sliding window of a size."""


def read_layers(fields: Fields, family: str, make_window: MakeWindow) -> BackboneConfig:
    """Read the layers of a draft.

    Args:
        fields: A decoder's config.
        family: qwen3 (norms of queries and keys), llama (none) or gemma4.
        make_window: What sliding layers see.

    Raises:
        CheckpointError: If a field is missing, wrong, or asks for what is not supported.
    """
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    common: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_heads": heads,
        "windows": read_windows(fields, make_window),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope": _rope(fields),
        "max_positions": fields.integer("max_position_embeddings", 4096),
        "has_bias": fields.boolean("attention_bias", False),
    }
    if family == "gemma4":
        return BackboneConfig(**common, **_gemma4(fields))
    return BackboneConfig(
        **common,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", hidden // max(heads, 1)),
        activation=fields.text("hidden_act", "silu"),
        has_qk_norm=family == "qwen3",
    )


def _gemma4(fields: Fields) -> dict[str, Any]:
    if fields.boolean("enable_moe_block", False):
        raise CheckpointError(f"{fields.where}: enable_moe_block is true, but is not supported.")
    if fields.integer("hidden_size_per_layer_input", 0):
        raise CheckpointError(
            f"{fields.where}: hidden_size_per_layer_input is not 0, but is not supported."
        )
    shares = fields.boolean("attention_k_eq_v", False)
    return {
        "num_kv_heads": fields.integer(
            "num_global_key_value_heads" if shares else "num_key_value_heads"
        ),
        "head_dim": fields.integer("global_head_dim"),
        "activation": fields.text("hidden_activation", "gelu_pytorch_tanh"),
        "attention_scale": 1.0,
        "has_v_norm": True,
        "shares_kv": shares,
        "has_four_norms": True,
        "has_layer_scalar": True,
    }


def read_windows(fields: Fields, make_window: MakeWindow) -> tuple[Window | None, ...]:
    """Windows by layer, from num_hidden_layers, layer_types and sliding_window."""
    count = fields.integer("num_hidden_layers")
    kinds = fields.names("layer_types", [FULL] * count)
    if len(kinds) != count or set(kinds) - {FULL, SLIDING}:
        raise CheckpointError(
            f"{fields.where}: layer_types is {kinds}, but must have {count} entries, each {FULL} "
            f"or {SLIDING}."
        )
    if SLIDING not in kinds:
        return (None,) * count
    window = make_window(fields.integer("sliding_window"))
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _rope(fields: Fields) -> Mapping[str, Any]:
    """Rotary parameters, from the form of transformers 5 or the one before it."""
    rope: dict[str, Any]
    if fields.has("rope_parameters"):
        rope = dict(fields.mapping("rope_parameters"))
        if FULL in rope or SLIDING in rope:  # by layer type; all draft layers use the full one's
            rope = dict(Fields(rope, f"{fields.where}: rope_parameters").mapping(FULL))
    else:
        rope = dict(fields.mapping("rope_scaling")) if fields.has("rope_scaling") else {}
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = fields.number("rope_theta")
    return rope


def dump_layers(backbone: BackboneConfig, family: str) -> dict[str, Any]:
    """The fields that `read_layers` reads back."""
    windows = [window for window in backbone.windows if window is not None]
    fields: dict[str, Any] = {
        "hidden_size": backbone.hidden_size,
        "intermediate_size": backbone.intermediate_size,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_heads,
        "num_key_value_heads": backbone.num_kv_heads,
        "head_dim": backbone.head_dim,
        "rms_norm_eps": backbone.norm_eps,
        "rope_parameters": {"rope_type": "default", **backbone.rope},
        "max_position_embeddings": backbone.max_positions,
        "attention_bias": backbone.has_bias,
        "layer_types": [FULL if window is None else SLIDING for window in backbone.windows],
        "sliding_window": windows[0].size if windows else None,
        "sliding_window_non_causal": not (windows and windows[0].is_causal),
    }
    if family == "gemma4":
        fields |= {
            "global_head_dim": backbone.head_dim,
            "num_global_key_value_heads": backbone.num_kv_heads,
            "attention_k_eq_v": backbone.shares_kv,
            "hidden_activation": backbone.activation,
            "enable_moe_block": False,
            "hidden_size_per_layer_input": 0,
            "rope_parameters": {FULL: fields["rope_parameters"]},
        }
        if not windows:
            del fields["sliding_window"]  # Gemma's config class refuses null
    else:
        fields["hidden_act"] = backbone.activation
    return fields
