"""Small random draft modules, and contexts for them."""

from __future__ import annotations

from typing import Any

import torch

from dspark.draft.dspark_config import BackboneConfig, DSparkConfig, Window
from dspark.draft.dspark_module import DSparkModule
from dspark.mtp_head import DraftVocab
from dspark.target import TargetInfo
from dspark.tree import DraftTree

VOCAB, HIDDEN = 96, 64
LAYER_IDS = (0, 1, 2)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

_GEMMA: dict[str, Any] = {
    "attention_scale": 1.0,
    "activation": "gelu_pytorch_tanh",
    "has_v_norm": True,
    "has_four_norms": True,
    "has_layer_scalar": True,
    "rope": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
STYLES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"has_qk_norm": False, "has_bias": True},
    "gemma4": {**_GEMMA, "shares_kv": True},
    "gemma4 with v": _GEMMA,
    "sliding": {"windows": (Window(size=6), None)},
    "sliding causal": {"windows": (Window(size=6, is_causal=True), None)},
    "sliding moving": {"windows": (None, Window(size=6, moves=True, is_causal=True))},
}
HEADS: dict[str, dict[str, Any]] = {
    "none": {"markov_rank": 0},
    "vanilla": {"markov_rank": 8, "markov_head_type": "vanilla"},
    "gated": {"markov_rank": 8, "markov_head_type": "gated"},
    "rnn": {"markov_rank": 8, "markov_head_type": "rnn"},
}


def make_config(style: str = "qwen3", head: str = "vanilla", **options: Any) -> DSparkConfig:
    layers = {"windows": (None, None), "rope": ROPE, **STYLES[style]}
    backbone = BackboneConfig(
        hidden_size=HIDDEN, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16, **layers
    )
    is_gemma = style.startswith("gemma4")
    values: dict[str, Any] = {
        "family": "gemma4" if is_gemma else "llama" if style == "llama" else "qwen3",
        "backbone": backbone,
        "vocab_size": VOCAB,
        "draft_vocab_size": VOCAB,
        "block_size": 5,
        "sample_from_anchor": True,
        "mask_token_id": 4,
        "target_layer_ids": LAYER_IDS,
        "target_hidden_size": HIDDEN,
        "num_target_layers": 4,
        "enable_confidence_head": True,
        "confidence_head_with_markov": head != "none",
        "embed_scale": HIDDEN**0.5 if is_gemma else 1.0,
        "logit_softcap": 5.0 if is_gemma else None,
        **HEADS[head],
    }
    return DSparkConfig(**{**values, **options})


def make_module(
    style: str = "qwen3",
    head: str = "vanilla",
    *,
    seed: int = 3,
    vocab: DraftVocab | None = None,
    shares: Any = None,
    **options: Any,
) -> DSparkModule:
    if vocab is not None:
        options["draft_vocab_size"] = vocab.draft_size
    module = DSparkModule(make_config(style, head, **options), vocab, shares)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() > 1:
            torch.nn.init.normal_(tensor.data, std=0.25, generator=generator)
        else:
            torch.nn.init.normal_(tensor.data, mean=1.0, std=0.2, generator=generator)
    return module.eval().requires_grad_(False)


def make_features(size: int, seed: int = 0, layers: tuple[int, ...] = LAYER_IDS) -> dict:
    """Hidden states of positions 0 .. size - 1; the first rows do not depend on `size`."""
    rows = {}
    for layer in layers:
        generator = torch.Generator().manual_seed(1000 * seed + layer)
        rows[layer] = torch.randn(400, HIDDEN, generator=generator)[:size]
    return rows


def joined(features: dict) -> torch.Tensor:
    return torch.cat(list(features.values()), dim=-1)


def target_info(**changes: Any) -> TargetInfo:
    values: dict[str, Any] = {
        "name": "toy",
        "family": "toy",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_layers": 4,
        "max_positions": 2048,
        "eos_token_ids": (),
        "dtype": "float32",
        "device": "cpu",
    }
    return TargetInfo(**{**values, **changes})


def paths_of(tree: DraftTree) -> list[tuple[int, ...]]:
    """Tokens down to every node."""
    return [tuple(tree.path_tokens(node)) for node in range(tree.num_nodes)]
