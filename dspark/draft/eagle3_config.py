"""config.json of EAGLE-3 checkpoints in three layouts: SafeAILab's ("eagle3"), DeepSpec's and speculators'.

What they say differently, all of it silent if read wrongly:

| | eagle3 | deepspec | speculators |
|---|---|---|---|
| layer ids | `eagle_aux_hidden_state_layer_ids`, see below | `target_layer_ids`: the OUTPUT of layer k | as eagle3 |
| decoder options | top level | top level | `transformer_layer_config` |
| the layer | `midlayer.*` or `layers.0.*` | `layers.0.*` | `layers.0.*` |
| vocabulary | `d2t` offsets, `t2d` | the target's | as eagle3, or the target's |
| layer kind | Llama | Qwen 3 or Gemma 4 | Llama or Qwen 3 |

Here a layer id is always the output of decoder layer k, -1 the embeddings (dspark/target.py): the
input of layer k is the output of k - 1.

**`eagle_aux_hidden_state_layer_ids` has two meanings.** At top level (speculators, vLLM) it names
INPUTS. Inside `eagle_config` SpecForge means OUTPUTS, as does SGLang for most targets: the usual
three are 1, n/2 - 1, n - 4 there and 2, n/2, n - 3 at top level. Other checkpoints nest inputs, and
vLLM takes every list for inputs. So nested ids that begin with 1 are outputs and others inputs, as
SGLang does for DeepSeek-V3 (its #25454): the output of layer 0, which 1 as an input would be, is
hardly ever read. Where both places have a list, the one at top level counts.

**Source:** SafeAILab/EAGLE `eagle/model/cnets.py`; vLLM `llama_eagle3.py`; SpecForge; speculators
`models/eagle3`; DeepSpec `modeling/eagle3`.
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from dspark.draft.eagle3_module import Eagle3Config
from dspark.errors import CapabilityError, CheckpointError, ConfigError
from dspark.target import TargetInfo

__all__ = ["Layout", "is_eagle3", "read_config", "write_config"]

Layout = Literal["eagle3", "deepspec", "speculators"]

_DEEPSPEC = {"Qwen3Eagle3Model": "qwen3", "Gemma4Eagle3Model": "gemma4"}
_PLAIN = {
    "LlamaForCausalLMEagle3": "llama",
    "Eagle3LlamaForCausalLM": "llama",
    "LlamaForCausalLM": "llama",  # the first checkpoints, told by their draft_vocab_size
    "Qwen3ForCausalLMEagle3": "qwen3",
    "Eagle3Qwen3ForCausalLM": "qwen3",
}
_IDS = "eagle_aux_hidden_state_layer_ids"
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def is_eagle3(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an EAGLE-3 draft, in any layout."""
    if "speculators_model_type" in config:
        return bool(config["speculators_model_type"] == "eagle3")
    name = _architecture(config)
    return "eagle3" in name.lower() or (name == "LlamaForCausalLM" and "draft_vocab_size" in config)


def read_config(raw: Mapping[str, Any], target: TargetInfo, *, has_embedding: bool) -> Eagle3Config:
    """Translate a config.json.

    Args:
        raw: Its contents.
        target: What the draft is for.
        has_embedding: Whether the checkpoint holds an embedding.

    Returns:
        Shape and options.

    Raises:
        CheckpointError: If a field is missing or not of its type.
        ConfigError: If a field does not fit the target, or a value is out of range.
        CapabilityError: If the draft is of a kind that is not supported.
    """
    layout, kind = _layout(raw)
    layer = _mapping(raw, "transformer_layer_config") if layout == "speculators" else raw
    _refuse(layer, "num_hidden_layers", layer.get("num_hidden_layers", 1) != 1, "1")
    for holder in (raw, layer):
        for field in ("quantization_config", "compression_config"):
            _refuse(holder, field, bool(holder.get(field)), "absent: weights must not be quantised")
    if "sliding_attention" in (layer.get("layer_types") or ()):
        _refuse(layer, "layer_types", True, "full_attention")
    hidden, heads = _integer(layer, "hidden_size"), _integer(layer, "num_attention_heads")
    options: dict[str, Any] = {
        "hidden_size": hidden,
        "target_hidden_size": _integer(raw, "target_hidden_size", hidden),
        "target_layers": _target_layers(raw, layout, target),
        "intermediate_size": _integer(layer, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": _integer(layer, "num_key_value_heads", heads),
        "head_dim": _integer(layer, "head_dim", hidden // max(heads, 1)),
        "vocab_size": _integer(layer, "vocab_size"),
        "max_positions": _integer(layer, "max_position_embeddings", 2048),
        "rms_norm_eps": _number(layer, "rms_norm_eps", 1e-6),
        "activation": layer.get("hidden_act") or "silu",
        "rope": _rope(layer),
        "attention_bias": _flag(layer, "attention_bias"),
        "mlp_bias": _flag(layer, "mlp_bias"),
        "qk_norm": kind != "llama",
        "has_embedding": has_embedding,
    }
    if layout == "deepspec":
        options["draft_vocab_size"] = options["vocab_size"]
    else:
        options["draft_vocab_size"] = _integer(raw, "draft_vocab_size", options["vocab_size"])
        options.update({name: _flag(raw, name) for name in _FLAGS})
        if raw.get("logit_softcap") is not None:
            options["logit_softcap"] = _number(raw, "logit_softcap", 0.0)
    if kind == "gemma4":
        options.update(_gemma4(raw, hidden))
    config = Eagle3Config(**options)
    _check_target(config, raw, target)
    return config


def _layout(raw: Mapping[str, Any]) -> tuple[Layout, str]:
    """The layout of a config, and the kind of its layer: llama, qwen3 or gemma4."""
    if raw.get("speculators_model_type") == "eagle3":
        kind = _mapping(raw, "transformer_layer_config").get("model_type", "llama")
        if kind not in ("llama", "qwen3"):
            raise CapabilityError(
                f"transformer_layer_config.model_type is {kind!r}, but must be llama or qwen3."
            )
        return "speculators", kind
    name = _architecture(raw)
    if name in _DEEPSPEC:
        return "deepspec", _DEEPSPEC[name]
    if name in _PLAIN and is_eagle3(raw):
        return "eagle3", _PLAIN[name]
    known = ", ".join([*_PLAIN, *_DEEPSPEC])
    raise CapabilityError(f"architectures is [{name!r}], but must be one of {known}.")


def _gemma4(raw: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    """What DeepSpec's Gemma 4 layer does differently; its fields are those of Gemma's text config.

    They are read from the JSON, since transformers' own object has no such fields any more.
    """
    _refuse(raw, "enable_moe_block", _flag(raw, "enable_moe_block"), "false")
    per_layer = raw.get("hidden_size_per_layer_input") or 0
    _refuse(raw, "hidden_size_per_layer_input", per_layer != 0, "0")
    shared = _flag(raw, "attention_k_eq_v")
    softcap = raw.get("final_logit_softcapping")
    return {
        "head_dim": _integer(raw, "global_head_dim"),
        "num_kv_heads": _integer(
            raw, "num_global_key_value_heads" if shared else "num_key_value_heads"
        ),
        "activation": raw.get("hidden_activation") or "gelu_pytorch_tanh",
        "attention_scale": 1.0,
        "embed_scale": hidden**0.5,
        "key_is_value": shared,
        "v_norm": True,
        "sandwich_norms": True,
        "layer_scalar": True,
        "logit_softcap": None if softcap is None else float(softcap),
    }


def _target_layers(raw: Mapping[str, Any], layout: Layout, target: TargetInfo) -> tuple[int, ...]:
    """Layers whose outputs the draft reads."""
    if layout == "deepspec":
        return _layer_ids(raw, "target_layer_ids", range(target.num_layers - 1), 0)
    nested = raw.get("eagle_config") or {}
    if nested.get("use_aux_hidden_state") is False:
        raise CapabilityError("eagle_config.use_aux_hidden_state is false, but must be true.")
    names = (_IDS, "aux_hidden_state_layer_ids")
    for holder in (raw, nested):
        for name in names:
            ids = holder.get(name)
            if ids is None:
                continue
            if holder is nested and isinstance(ids, list) and ids[:1] == [1]:
                return _layer_ids(holder, name, range(target.num_layers), 0)
            # The "input" of the layer after the last is the last one's output.
            return _layer_ids(holder, name, range(target.num_layers + 1), 1)
    layers = (1, target.num_layers // 2 - 1, target.num_layers - 4)
    if not 1 < layers[1] < layers[2]:
        raise ConfigError(
            f"config.json has no {_IDS}, and the usual three do not exist in "
            f"{target.name}, which has {target.num_layers} layers."
        )
    return layers


def _layer_ids(holder: Mapping[str, Any], name: str, allowed: range, shift: int) -> tuple[int, ...]:
    ids = holder.get(name)
    is_list = isinstance(ids, list) and all(type(value) is int for value in ids)
    if not is_list or not ids or len(set(ids)) < len(ids) or not set(ids) <= set(allowed):
        raise ConfigError(
            f"{name} is {ids}, but must list distinct layers of the target, "
            f"0 to {len(allowed) - 1}."
        )
    return tuple(value - shift for value in ids)


def _check_target(config: Eagle3Config, raw: Mapping[str, Any], target: TargetInfo) -> None:
    """Refuse a draft of another target, by field name."""
    pairs = [
        ("vocab_size", config.vocab_size, target.vocab_size),
        ("target_hidden_size", config.target_hidden_size, target.hidden_size),
        ("num_target_layers", raw.get("num_target_layers") or target.num_layers, target.num_layers),
    ]
    if not config.has_embedding:
        pairs.append(("hidden_size", config.hidden_size, target.hidden_size))
    for name, mine, theirs in pairs:
        if mine != theirs:
            raise ConfigError(
                f"the draft's {name} is {mine}, but {target.name} has {theirs}.",
                hint="use a draft made for this target, or --draft lookup",
            )


def _rope(layer: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE parameters in the form of transformers 5, from any form."""
    rope = dict(layer.get("rope_parameters") or {})
    if isinstance(rope.get("full_attention"), Mapping):
        rope = dict(rope["full_attention"])
    if not rope:
        rope = dict(layer.get("rope_scaling") or {})
    rope.setdefault("rope_theta", layer.get("rope_theta") or 10000.0)
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    if "mrope_section" in rope:
        rope["rope_type"] = "default"  # for text the three axes of mrope hold the same position
    return rope


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _mapping(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = raw.get(name)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json has no {name}, or it is not an object.")
    return value


def _integer(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if type(value) is not int:
        raise CheckpointError(f"{name} in config.json is {value!r}, but must be an integer.")
    return value


def _number(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{name} in config.json is {value!r}, but must be a number.")
    return float(value)


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{name} in config.json is {value!r}, but must be true or false.")
    return bool(value)


def _refuse(raw: Mapping[str, Any], name: str, is_wrong: bool, allowed: str) -> None:
    if is_wrong:
        raise CapabilityError(f"{name} of the draft is {raw.get(name)!r}, but must be {allowed}.")


def write_config(
    config: Eagle3Config, layout: Layout, num_target_layers: int | None, verifier: str | None
) -> dict[str, Any]:
    """The config.json of a draft; see `dspark.draft.eagle3_format.save_eagle3`.

    Raises:
        ConfigError: If the layout cannot say what the draft is.
    """
    is_gemma = config.sandwich_norms
    kind = "gemma4_text" if is_gemma else "qwen3" if config.qk_norm else "llama"
    plain = not any(getattr(config, name) for name in _FLAGS)
    if layout == "deepspec":
        reduced = config.draft_vocab_size < config.vocab_size
        narrower = config.hidden_size != config.target_hidden_size
        fits = plain and kind != "llama" and config.has_embedding and not reduced and not narrower
    else:
        fits = not is_gemma
    if not fits:
        raise ConfigError(f"layout {layout!r} cannot describe this draft.")
    layer: dict[str, Any] = {
        "model_type": kind,
        "num_hidden_layers": 1,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": config.activation,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rope_parameters": dict(config.rope),
        "tie_word_embeddings": False,
    }
    if layout == "deepspec":
        return _deepspec_json(config, layer, num_target_layers)
    drafted: dict[str, Any] = {
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        _IDS: [layer_id + 1 for layer_id in config.target_layers],
        **{name: getattr(config, name) for name in _FLAGS},
    }
    if config.logit_softcap is not None:
        drafted["logit_softcap"] = (
            config.logit_softcap
        )  # no other engine's field: their head has none
    if layout == "eagle3":
        name = "Qwen3ForCausalLMEagle3" if config.qk_norm else "LlamaForCausalLMEagle3"
        return {"architectures": [name], **layer, **drafted}
    method = {"proposal_type": "greedy", "speculative_tokens": 5}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": verifier, "architectures": []},
        },
        "transformer_layer_config": layer,
        **drafted,
    }


def _deepspec_json(
    config: Eagle3Config, layer: dict[str, Any], num_target_layers: int | None
) -> dict[str, Any]:
    common = {
        "target_layer_ids": list(config.target_layers),
        "ttt_length": 7,
        "step_loss_decay": 0.8,
        "draft_num_hidden_layers": 1,
        "layer_types": ["full_attention"],
    }
    if num_target_layers is not None:
        common["num_target_layers"] = num_target_layers
    if not config.sandwich_norms:
        return {"architectures": ["Qwen3Eagle3Model"], **layer, **common}
    return {
        "architectures": ["Gemma4Eagle3Model"],
        **layer,
        **common,
        "global_head_dim": config.head_dim,
        "num_global_key_value_heads": config.num_kv_heads,
        "hidden_activation": config.activation,
        "attention_k_eq_v": config.key_is_value,
        "final_logit_softcapping": config.logit_softcap,
        "enable_moe_block": False,
        "hidden_size_per_layer_input": 0,
        "rope_parameters": {"full_attention": dict(config.rope)},
    }
