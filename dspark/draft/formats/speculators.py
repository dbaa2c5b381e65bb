"""The layout of the speculators library: DFlash and DSpark.

The decoder's config is nested, hidden states are named by the layer they ENTER (one more than the
layer they leave), and the vocabulary may be reduced (d2t: offset from a draft id to a target id).
Layers are Qwen3's whatever `model_type` the nested config has.

`sample_from_anchor`, where it is missing: DFlash's is false; for DSpark readers disagree, so it
follows from `speculative_tokens` if that is written, else it is speculators' own default, true.

**Source:** github.com/vllm-project/speculators, configs and models of dflash and dspark.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dspark.draft.dspark_config import DSparkConfig, Window
from dspark.draft.formats.fields import Fields
from dspark.draft.formats.layers import read_layers
from dspark.errors import CheckpointError
from dspark.target import TargetInfo

__all__ = ["ALGORITHMS", "handles", "read"]

ALGORITHMS = ("dflash", "dspark")


def handles(config: Mapping[str, Any]) -> bool:
    """True for a config.json of this layout."""
    return config.get("speculators_model_type") in ALGORITHMS


def read(
    config: Mapping[str, Any], where: Path, info: TargetInfo, tensors: Mapping[str, torch.Tensor]
) -> DSparkConfig:
    """Read a config.json."""
    fields = Fields(config, where)
    inner = Fields(fields.mapping("transformer_layer_config"), f"{where}: transformer_layer_config")
    is_dspark = fields.text("speculators_model_type") == "dspark"
    is_causal = not fields.boolean("sliding_window_non_causal", False)
    backbone = read_layers(inner, "qwen3", lambda size: Window(size=size, is_causal=is_causal))
    block_size = fields.integer("block_size", 8)
    has_confidence = is_dspark and fields.boolean("enable_confidence_head", True)
    return DSparkConfig(
        family="qwen3",
        backbone=backbone,
        vocab_size=inner.integer("vocab_size"),
        draft_vocab_size=fields.integer("draft_vocab_size"),
        block_size=block_size,
        sample_from_anchor=_samples_from_anchor(fields, block_size, is_dspark),
        mask_token_id=fields.integer("mask_token_id"),
        target_layer_ids=tuple(i - 1 for i in fields.integers("aux_hidden_state_layer_ids")),
        target_hidden_size=fields.integer("target_hidden_size", backbone.hidden_size),
        num_target_layers=info.num_layers,  # not written
        markov_rank=fields.integer("markov_rank", 256) if is_dspark else 0,
        markov_head_type=fields.text("markov_head_type", "vanilla"),
        enable_confidence_head=has_confidence,
        confidence_head_with_markov=has_confidence
        and fields.boolean("confidence_head_with_markov", True),
        owns_embedding="embed_tokens.weight" in tensors,
        owns_head="lm_head.weight" in tensors,
    )


def _samples_from_anchor(fields: Fields, block_size: int, is_dspark: bool) -> bool:
    count = _speculative_tokens(fields)
    if fields.has("sample_from_anchor"):
        value = fields.boolean("sample_from_anchor")
    elif is_dspark and count is not None:
        value = count >= block_size
    else:
        value = is_dspark
    gamma = block_size if value else block_size - 1
    if count is not None and count != gamma:
        raise CheckpointError(
            f"{fields.where}: speculative_tokens is {count}, but block_size {block_size} with "
            f"sample_from_anchor {str(value).lower()} makes {gamma}.",
            hint="a block of another length than trained spoils every position",
        )
    return value


def _speculative_tokens(fields: Fields) -> int | None:
    """What the first proposal method says, None if it says nothing."""
    if not fields.has("speculators_config"):
        return None
    methods = fields.mapping("speculators_config").get("proposal_methods")
    if not isinstance(methods, list) or not methods or not isinstance(methods[0], dict):
        return None
    method = Fields(methods[0], f"{fields.where}: proposal_methods")
    return method.integer("speculative_tokens") if method.has("speculative_tokens") else None
