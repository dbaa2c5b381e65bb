"""From GGUF metadata to a Hugging Face config, one function per architecture.

What the file does not say is what llama.cpp assumes for that architecture: Gemma's query scaling,
its pattern of sliding and global layers, its local rope base.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dspark.errors import CapabilityError, CheckpointError
from dspark.models.gguf_reader import GGUFFile

__all__ = ["ARCHITECTURES", "Architecture", "build_config", "get_architecture"]

# Tokens that end a turn or a text; llama.cpp finds them by their text too.
_END_TOKENS = frozenset(
    {
        "</s>",
        "<EOT>",
        "<end_of_turn>",
        "<eos>",
        "<|end_of_text|>",
        "<|end|>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|im_end|>",
        "<｜end▁of▁sentence｜>",
    }
)
_CONTROL, _ROPE_FREQS = 3, "rope_freqs.weight"
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one GGUF architecture maps to transformers.

    Attributes:
        model_type: transformers' model_type.
        model_class: Its causal LM class.
        config: Gives the config fields that are its own.
        layer_names: GGUF name within a block -> module path within a layer.
        norm_offset: What the file adds to norm weights (Gemma's norms multiply by 1 + w).
        interleaves_rope: True if the rows of q and k are in the order of interleaved rope.
    """

    model_type: str
    model_class: str
    config: Callable[[_Meta], dict[str, Any]]
    layer_names: dict[str, str]
    norm_offset: float = 0.0
    interleaves_rope: bool = False


class _Meta:
    """Typed access to the metadata of one architecture."""

    def __init__(self, file: GGUFFile, arch: str) -> None:
        self.file, self.arch = file, arch

    def get(self, key: str, default: Any = _MISSING) -> Any:
        value = self.file.metadata.get(f"{self.arch}.{key}", default)
        if value is _MISSING:
            raise CheckpointError(f"{self.file.path} lacks the entry {self.arch}.{key}.")
        return value

    def count(self, key: str, default: Any = _MISSING) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            if isinstance(value, np.ndarray):
                raise CapabilityError(
                    f"{self.file.path} has a different {self.arch}.{key} for each layer, "
                    "but only one for all layers is supported."
                )
            raise CheckpointError(
                f"{self.file.path} says {self.arch}.{key} is {value!r}, but it must be >= 1."
            )
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        value = self.get(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{self.file.path} says {self.arch}.{key} is {value!r}.")
        # The file holds float32: 9.99999997e-07 was written as 1e-06.
        return float(str(np.float32(value)))


def get_architecture(file: GGUFFile) -> Architecture:
    """Find how to read a file.

    Args:
        file: Header of the file.

    Returns:
        Its architecture.

    Raises:
        CapabilityError: If the architecture is not supported.
    """
    name = file.metadata.get("general.architecture")
    found = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if found is None:
        raise CapabilityError(
            f"{file.path} is a GGUF file of architecture {name!r}, "
            f"but only {', '.join(ARCHITECTURES)} are supported."
        )
    return found


def build_config(file: GGUFFile) -> dict[str, Any]:
    """Build the config.

    Args:
        file: Header of the file.

    Returns:
        Fields of the transformers config, model_type included.

    Raises:
        CheckpointError: If an entry is missing or out of range.
        CapabilityError: If the model needs something that is not supported.
    """
    architecture = get_architecture(file)
    meta = _Meta(file, str(file.metadata["general.architecture"]))
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} lacks the tensor token_embd.weight.")
    if meta.get("expert_count", 0):
        raise CapabilityError(
            f"{file.path} is a mixture of experts, which is not read from GGUF files.",
            hint="use the safetensors weights of the same model",
        )
    heads, hidden = meta.count("attention.head_count"), meta.count("embedding_length")
    fields = {
        "model_type": architecture.model_type,
        "architectures": [architecture.model_class],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": meta.count("feed_forward_length"),
        "num_hidden_layers": meta.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.count("attention.head_count_kv", heads),
        "head_dim": _head_dim(meta, hidden // heads),
        "max_position_embeddings": meta.count("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": _token_id(file, "bos"),
        "pad_token_id": _token_id(file, "padding"),
        "eos_token_id": _end_tokens(file),
    }
    return fields | architecture.config(meta)


def _head_dim(meta: _Meta, default: int) -> int:
    rotary = meta.get("rope.dimension_count", None)
    head_dim = meta.count("attention.key_length", rotary or default)
    if rotary not in (None, head_dim):
        raise CapabilityError(
            f"{meta.file.path} rotates {rotary} of {head_dim} dimensions of a head, "
            "but only rope over all of them is supported."
        )
    if meta.get("attention.value_length", head_dim) != head_dim:
        raise CapabilityError(f"{meta.file.path} has keys and values of different lengths.")
    return head_dim


def _token_id(file: GGUFFile, name: str) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return value if isinstance(value, int) else None


def _end_tokens(file: GGUFFile) -> int | list[int] | None:
    ids = [_token_id(file, name) for name in ("eos", "eot", "eom")]
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    kinds = file.metadata.get("tokenizer.ggml.token_type", [])
    named = [
        index
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == _CONTROL and token in _END_TOKENS
    ]
    found = list(dict.fromkeys(value for value in [*ids, *named] if value is not None))
    return found[0] if len(found) == 1 else found or None


def _rope(meta: _Meta, default_theta: float = 10_000.0) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": meta.number("rope.freq_base", default_theta),
    }
    kind = meta.get("rope.scaling.type", "none")
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": meta.number("rope.scaling.factor")}
    if kind != "none":
        raise CapabilityError(
            f"{meta.file.path} uses rope scaling {kind!r}, but only linear scaling is read.",
            hint="use the safetensors weights of the same model",
        )
    if _ROPE_FREQS in meta.file.tensors:
        return _llama3_rope(meta, rope)
    return rope


def _llama3_rope(meta: _Meta, rope: dict[str, Any]) -> dict[str, Any]:
    """Recover the settings of Llama 3.1 to 3.3 from the table of divisors that the file holds."""
    divisors = meta.file.load(_ROPE_FREQS).astype(np.float64)
    settings = {
        "rope_type": "llama3",
        "factor": round(float(divisors.max()), 3),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    n = len(divisors)
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(n) / n)
    smooth = np.clip((8192 / wavelength - 1.0) / 3.0, 0.0, 1.0)
    expected = 1.0 / ((1 - smooth) / settings["factor"] + smooth)
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise CapabilityError(
            f"{meta.file.path} holds rope divisors of an unknown kind ({_ROPE_FREQS}).",
            hint="use the safetensors weights of the same model",
        )
    return rope | settings


def _llama(meta: _Meta) -> dict[str, Any]:
    tensors = meta.file.tensors
    return {
        "rope_parameters": _rope(meta),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _qwen2(meta: _Meta) -> dict[str, Any]:
    return {"rope_parameters": _rope(meta)}


def _qwen3(meta: _Meta) -> dict[str, Any]:
    has_bias = "blk.0.attn_q.bias" in meta.file.tensors
    return {"rope_parameters": _rope(meta), "attention_bias": has_bias}


def _query_scalar(meta: _Meta, largest: int) -> float:
    """Gemma scales queries by the head's length, but by hidden / heads in the largest model."""
    if meta.count("block_count") == largest:
        return meta.count("embedding_length") / meta.count("attention.head_count")
    return _head_dim(meta, 256)


def _layer_types(meta: _Meta, default: int) -> list[str]:
    """Every `default`-th layer is global, unless the file says otherwise."""
    layers = meta.count("block_count")
    pattern = meta.get("attention.sliding_window_pattern", default)
    if isinstance(pattern, np.ndarray):
        slides = [bool(value) for value in pattern]
    else:
        slides = [bool((index + 1) % int(pattern)) for index in range(layers)]
    if len(slides) != layers:
        raise CheckpointError(f"{meta.file.path} names {len(slides)} layer kinds for {layers}.")
    return ["sliding_attention" if s else "full_attention" for s in slides]


def _gemma2(meta: _Meta) -> dict[str, Any]:
    return {
        "rope_parameters": _rope(meta),
        "sliding_window": meta.count("attention.sliding_window", 4096),
        "layer_types": _layer_types(meta, 2),
        "query_pre_attn_scalar": _query_scalar(meta, 46),
        "attn_logit_softcapping": meta.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": meta.number("final_logit_softcapping", 30.0),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _gemma3(meta: _Meta) -> dict[str, Any]:
    local = {
        "rope_type": "default",
        "rope_theta": meta.number("rope.local.freq_base", meta.get("rope.freq_base_swa", 10_000.0)),
    }
    softcap = meta.get("final_logit_softcapping", None)
    return {
        "rope_parameters": {
            "full_attention": _rope(meta, 1_000_000.0),
            "sliding_attention": local,
        },
        "sliding_window": meta.count("attention.sliding_window"),
        "layer_types": _layer_types(meta, 6),
        "query_pre_attn_scalar": _query_scalar(meta, 62),
        "final_logit_softcapping": softcap or None,
        "attn_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
    }


_COMMON = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TWO_NORMS = _COMMON | {"ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = _COMMON | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", _llama, _TWO_NORMS, interleaves_rope=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _qwen2, _TWO_NORMS),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _qwen3, _TWO_NORMS | _HEAD_NORMS),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _gemma2, _FOUR_NORMS, norm_offset=1.0),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _gemma3, _FOUR_NORMS | _HEAD_NORMS, norm_offset=1.0
    ),
}
"""Supported GGUF architectures."""
