"""The layout of SpecForge and z-lab: DSparkDraftModel, DFlashDraftModel.

Qwen3 layers; the draft's fields are nested in `dflash_config`; embedding and head are the target's.
Fields are looked up as SGLang does: with the prefix dspark_, then in `dspark_config`, then in
`dflash_config`, then at top level; places that contradict each other are refused. DSpark's anchor
slot predicts, DFlash's does not.

**Source:** github.com/sgl-project/SpecForge, draft models dflash and dspark and their training
(labels from offset 1 for dspark, 0 for dflash); its masks for sliding layers.
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

__all__ = ["ARCHITECTURES", "handles", "read"]

ARCHITECTURES = ("DSparkDraftModel", "DFlashDraftModel")
_NAMES = (
    "block_size",
    "mask_token_id",
    "target_layer_ids",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "confidence_head_alpha",
    "projector_type",
    "sample_from_anchor",
)
_ALIASES = {"mask_token_id": ("mask_token_id", "noise_token_id")}


def handles(config: Mapping[str, Any]) -> bool:
    """True for a config.json of this layout."""
    names = config.get("architectures")
    return isinstance(names, list) and bool(names) and names[0] in ARCHITECTURES


def read(
    config: Mapping[str, Any], where: Path, info: TargetInfo, tensors: Mapping[str, torch.Tensor]
) -> DSparkConfig:
    """Read a config.json."""
    top = Fields(config, where)
    fields = Fields(_gather(config, where), where)
    projector = fields.text("projector_type", "dflash")
    if projector not in ("dflash", "dspark"):
        raise CheckpointError(
            f"{where}: projector_type is {projector!r}, but must be dflash or dspark."
        )
    is_dspark = config["architectures"][0] == "DSparkDraftModel" or projector == "dspark"
    backbone = read_layers(top, "qwen3", _window)
    vocab = top.integer("vocab_size")
    rank = fields.integer("markov_rank", 0) if is_dspark else 0
    alpha = fields.number("confidence_head_alpha", 0.0)
    has_confidence = is_dspark and fields.boolean("enable_confidence_head", alpha > 0)
    return DSparkConfig(
        family="qwen3",
        backbone=backbone,
        vocab_size=vocab,
        draft_vocab_size=top.integer("draft_vocab_size", vocab),
        block_size=fields.integer("block_size"),
        sample_from_anchor=fields.boolean("sample_from_anchor", is_dspark),
        mask_token_id=fields.integer("mask_token_id"),
        target_layer_ids=fields.integers("target_layer_ids"),
        target_hidden_size=top.integer("target_hidden_size", backbone.hidden_size),
        num_target_layers=top.integer("num_target_layers", info.num_layers),
        markov_rank=rank,
        markov_head_type=fields.text("markov_head_type", "vanilla").lower(),
        enable_confidence_head=has_confidence,
        confidence_head_with_markov=has_confidence
        and fields.boolean("confidence_head_with_markov", False),
        owns_embedding="embed_tokens.weight" in tensors,
        owns_head="lm_head.weight" in tensors,
    )


def _window(size: int) -> Window:
    return Window(size=size, moves=True, is_causal=True)


def _gather(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The draft's fields from all places, the first found counting."""
    nested = [config.get(name) or {} for name in ("dspark_config", "dflash_config")]
    if any(not isinstance(place, dict) for place in nested):
        raise CheckpointError(f"{where}: dspark_config and dflash_config must be objects.")
    found: dict[str, Any] = {}
    for name in _NAMES:
        values = []
        for alias in _ALIASES.get(name, (name,)):
            values.append(config.get(f"dspark_{alias}"))
            values.extend(place.get(alias) for place in (*nested, config))
        given = [value for value in values if value is not None]
        if not given:
            continue
        if any(value != given[0] for value in given):
            raise CheckpointError(f"{where}: {name} is given several times: {given}.")
        found[name] = given[0]
    return found
