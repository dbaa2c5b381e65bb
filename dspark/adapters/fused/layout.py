"""Which parts of a transformers model the fused decoder computes, and whether it can.

The decoder (kernels/) is one for all families: norms, projections with or without bias, rotary
embedding, grouped attention with windows and soft-caps, a gated MLP. What differs between families
is stated in LAYOUTS; what differs between checkpoints is read off the modules. A model that has
anything else stays on the plain path, with the reason in words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dspark.adapters.base import FamilyAdapter
from dspark.adapters.quantise import GROUP

__all__ = ["LAYOUTS", "DecoderParts", "FamilyLayout", "LayerParts", "NotFused", "read_parts"]

_ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}


class NotFused(Exception):  # noqa: N818 - no error: the model takes the other path
    """A model, or a machine, that the fused decoder does not run; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyLayout:
    """How the layers of one family are put together.

    Attributes:
        has_four_norms: Norms behind attention and MLP too, not only before them.
        is_norm_offset: A norm multiplies by 1 + weight (and rounds once) instead of by weight.
    """

    has_four_norms: bool = False
    is_norm_offset: bool = False


_GEMMA = FamilyLayout(has_four_norms=True, is_norm_offset=True)
_LLAMA = FamilyLayout()

LAYOUTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}
"""Layouts by model type. Models of other types take the plain path."""

_NAMES = {
    False: ("input_layernorm", None, "post_attention_layernorm", None),
    True: (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""Norms of a layer, in the order in which they are applied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """Modules and figures of one decoder layer.

    Attributes:
        qkv: Projections of queries, keys and values.
        out: Projection behind attention.
        gate: Gate of the MLP.
        up: The half of the MLP that is gated.
        down: Projection behind the MLP.
        norms: Float32 [D] weights of the four places for a norm, None where there is none.
        head_norms: Float32 [d] weights of the norms of queries and keys, or (None, None).
        window: Tokens that a row sees, 0 for all.
        rope: Key of the rotary table (a layer type, or "").
        scale: Factor of the attention scores.
        softcap: Soft-cap of the scores, 0 for none.
    """

    qkv: tuple[nn.Linear, nn.Linear, nn.Linear]
    out: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    norms: tuple[Tensor | None, ...]
    head_norms: tuple[Tensor | None, Tensor | None]
    window: int
    rope: str
    scale: float
    softcap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderParts:
    """A whole decoder, taken apart.

    Attributes:
        embedding: Token ids -> what the first layer gets.
        layers: Decoder layers.
        norm: Float32 [D] weight of the final norm.
        head: Output head.
        rotary: (x, position ids [1, n], rope key) -> cosines and sines [1, n, d], in x's dtype.
        layout: The family's.
        heads: Query heads.
        kv_heads: K/V heads.
        head_dim: d.
        activation: Number of the MLP's activation in the kernels.
        eps: Of all norms.
        logit_softcap: Final soft-cap, 0 for none.
        dtype: Of the weights.
    """

    embedding: nn.Module
    layers: Sequence[LayerParts]
    norm: Tensor
    head: nn.Linear
    rotary: Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]]
    layout: FamilyLayout
    heads: int
    kv_heads: int
    head_dim: int
    activation: int
    eps: float
    logit_softcap: float
    dtype: torch.dtype


def read_parts(model: Any, adapter: FamilyAdapter, lanes: int, quant: str = "none") -> DecoderParts:
    """Take a stock model apart for the fused decoder.

    Args:
        model: A causal LM whose linear layers were not replaced yet.
        adapter: Its family.
        lanes: Floats of a vector of the kernels.
        quant: What its weights will be rounded to.

    Raises:
        NotFused: If anything about it is not what the kernels compute.
    """
    config = model.config.get_text_config()
    layout = LAYOUTS.get(str(config.model_type))
    if layout is None:
        raise NotFused(f"models of type {config.model_type} are not fused")
    backbone = model.get_decoder()
    parameter = next(model.parameters())
    if parameter.device.type != "cpu":
        raise NotFused("only CPU models are fused")
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        raise NotFused(f"{str(parameter.dtype).removeprefix('torch.')} models are not fused")
    if adapter.kv_source(config) != tuple(range(config.num_hidden_layers)):
        raise NotFused("layers that share K/V are not fused")
    kind = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if kind not in _ACTIVATIONS:
        raise NotFused(f"the activation {kind} is not fused")
    layers = [_layer(layer, layout, config) for layer in backbone.layers]
    attention = backbone.layers[0].self_attn
    dim = int(attention.head_dim)
    parts = DecoderParts(
        embedding=backbone.get_input_embeddings(),
        layers=layers,
        norm=_norm(backbone.norm, layout, config),
        head=_linear(model.get_output_embeddings()),
        rotary=_rotary(backbone.rotary_emb, {layer.rope for layer in layers}),
        layout=layout,
        heads=layers[0].qkv[0].out_features // dim,
        kv_heads=layers[0].qkv[1].out_features // dim,
        head_dim=dim,
        activation=_ACTIVATIONS[kind],
        eps=float(config.rms_norm_eps),
        logit_softcap=float(adapter.logit_softcap(config) or 0.0),
        dtype=parameter.dtype,
    )
    _check_sizes(parts, lanes, quant)
    for key in {layer.rope for layer in layers}:
        cosines, _ = parts.rotary(torch.zeros(1, dtype=parts.dtype), torch.zeros(1, 1).long(), key)
        if cosines.shape[-1] != dim:
            raise NotFused(f"its rotary embedding covers {cosines.shape[-1]} of {dim} numbers")
    return parts


def _layer(layer: Any, layout: FamilyLayout, config: Any) -> LayerParts:
    names = _NAMES[layout.has_four_norms]
    expected = {"self_attn", "mlp", *(name for name in names if name)}
    if {name for name, _ in layer.named_children()} != expected:
        raise NotFused("its layers have parts that are not fused")
    attention, mlp = layer.self_attn, layer.mlp
    is_by_type = config.model_type == "gemma3_text"
    return LayerParts(
        qkv=(_linear(attention.q_proj), _linear(attention.k_proj), _linear(attention.v_proj)),
        out=_linear(attention.o_proj),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        norms=tuple(_norm_of(layer, name, layout, config) for name in names),
        head_norms=(
            _norm_of(attention, "q_norm", layout, config),
            _norm_of(attention, "k_norm", layout, config),
        ),
        window=int(getattr(attention, "sliding_window", None) or _window(config)),
        rope=str(attention.layer_type) if is_by_type else "",
        scale=float(attention.scaling),
        softcap=float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
    )


def _window(config: Any) -> int:
    """Mistral's window holds for all layers and is not kept by its attention modules."""
    return int(config.sliding_window or 0) if config.model_type == "mistral" else 0


def _linear(module: Any) -> nn.Linear:
    if type(module) is not nn.Linear:
        raise NotFused(f"its linear layers are {type(module).__name__}")
    return module


def _norm(module: Any, layout: FamilyLayout, config: Any) -> Tensor:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps != config.rms_norm_eps or {n for n, _ in module.named_parameters()} != {"weight"}:
        raise NotFused(f"its norms are {type(module).__name__}")
    weight: Tensor = module.weight.detach().float()
    return 1.0 + weight if layout.is_norm_offset else weight.clone()


def _norm_of(parent: Any, name: str | None, layout: FamilyLayout, config: Any) -> Tensor | None:
    module = None if name is None else getattr(parent, name, None)
    return None if module is None else _norm(module, layout, config)


def _rotary(module: Any, keys: set[str]) -> Callable[[Tensor, Tensor, str], Any]:
    if keys == {""}:
        return lambda x, positions, key: module(x, positions)
    return lambda x, positions, key: module(x, positions, key)


def _check_sizes(parts: DecoderParts, lanes: int, quant: str) -> None:
    """Refuse sizes that do not fill vectors, and layers that differ in shape."""
    shapes = {
        (*(linear.weight.shape for linear in (*layer.qkv, layer.out, layer.up, layer.down)),)
        for layer in parts.layers
    }
    if len(shapes) != 1:
        raise NotFused("its layers differ in shape")
    hidden, inner = parts.norm.shape[0], parts.layers[0].up.out_features
    for name, size in (("hidden", hidden), ("MLP", inner), ("head", parts.head_dim)):
        if size % lanes:
            raise NotFused(f"its {name} size, {size}, is no multiple of {lanes}")
    if quant != "none":
        for size in (hidden, inner, parts.layers[0].out.in_features):
            if size % GROUP:
                raise NotFused(f"its {quant} weights have {size} inputs, no multiple of {GROUP}")
    if parts.heads % parts.kv_heads or parts.heads // parts.kv_heads > 32:
        raise NotFused(f"{parts.heads} query heads over {parts.kv_heads} K/V heads are not fused")
    if parts.layers[0].out.in_features != parts.heads * parts.head_dim:
        raise NotFused("its attention is not as wide as its heads")
