"""DeepSpec's layout, which is also the one dspark writes.

A copy of the target's config with the draft's own fields at top level, and flat tensor names.
DFlash releases of DeepSpec are the same class with markov_rank 0: their anchor slot predicts, too.
`sample_from_anchor`, absent there, is true.

Fields that only dspark writes: `sample_from_anchor`, `draft_vocab_size` with tensors `d2t` and
`t2d`, `shares_target_embedding`, `shares_target_head`, `sliding_window_non_causal`,
`target_hidden_size`.

**Source:** github.com/deepseek-ai/DeepSpec, configs and draft models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dspark.draft.dspark_config import DSparkConfig, Window
from dspark.draft.dspark_module import DSparkModule
from dspark.draft.formats.fields import Fields
from dspark.draft.formats.layers import dump_layers, read_layers
from dspark.errors import ConfigError
from dspark.mtp_head import DraftVocab
from dspark.target import TargetInfo

__all__ = ["ARCHITECTURES", "dump", "dump_vocab", "handles", "read", "save_draft"]

ARCHITECTURES = {
    "Qwen3DSparkModel": "qwen3",
    "Gemma4DSparkModel": "gemma4",
    "LlamaDSparkModel": "llama",  # dspark's own
}


def handles(config: Mapping[str, Any]) -> bool:
    """True for a config.json of this layout."""
    return _architecture(config) in ARCHITECTURES


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def read(
    config: Mapping[str, Any], where: Path, info: TargetInfo, tensors: Mapping[str, torch.Tensor]
) -> DSparkConfig:
    """Read a config.json; `tensors` is not looked at: what is stored follows from the fields."""
    fields = Fields(config, where)
    family = ARCHITECTURES[_architecture(config)]
    is_causal = not fields.boolean("sliding_window_non_causal", False)
    backbone = read_layers(fields, family, lambda size: Window(size=size, is_causal=is_causal))
    vocab = fields.integer("vocab_size")
    rank = fields.integer("markov_rank")
    has_confidence = fields.boolean("enable_confidence_head")
    is_gemma = family == "gemma4"
    has_cap = is_gemma and fields.has("final_logit_softcapping")
    return DSparkConfig(
        family=family,
        backbone=backbone,
        vocab_size=vocab,
        draft_vocab_size=fields.integer("draft_vocab_size", vocab),
        block_size=fields.integer("block_size"),
        sample_from_anchor=fields.boolean("sample_from_anchor", True),
        mask_token_id=fields.integer("mask_token_id"),
        target_layer_ids=fields.integers("target_layer_ids"),
        target_hidden_size=fields.integer("target_hidden_size", backbone.hidden_size),
        num_target_layers=fields.integer("num_target_layers"),
        markov_rank=rank,
        markov_head_type=fields.text("markov_head_type").lower() if rank else "vanilla",
        enable_confidence_head=has_confidence,
        confidence_head_with_markov=has_confidence
        and fields.boolean("confidence_head_with_markov"),
        owns_embedding=not fields.boolean("shares_target_embedding", False),
        owns_head=not fields.boolean("shares_target_head", False),
        embed_scale=backbone.hidden_size**0.5 if is_gemma else 1.0,
        logit_softcap=fields.number("final_logit_softcapping") if has_cap else None,
    )


def save_draft(folder: str | Path, module: DSparkModule, *, num_anchors: int = 512) -> Path:
    """Write a draft module as a folder that dspark, DeepSpec and vLLM read.

    The weights go first and the config last, each by a temporary name, so that a folder with a
    config is whole.

    Args:
        folder: Where to; made if missing.
        module: What to write.
        num_anchors: Anchors per sequence in training; DeepSpec's loader wants to know.

    Returns:
        The folder.

    Raises:
        ConfigError: If the module has what this layout cannot say.
    """
    folder = Path(folder)
    fields = dump(module.config, num_anchors)
    tensors = {name: value.detach().contiguous() for name, value in module.state_dict().items()}
    tensors |= dump_vocab(module.vocab)
    fields["dtype"] = str(module.fc.weight.dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    os.replace(part, folder / "model.safetensors")
    part = folder / "config.json.part"
    part.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    os.replace(part, folder / "config.json")
    return folder


def dump_vocab(vocab: DraftVocab) -> dict[str, torch.Tensor]:
    """The maps d2t (offset from a draft's id to the target's) and t2d of a reduced vocabulary."""
    if vocab.ids is None:
        return {}
    ids = vocab.ids.cpu()
    kept = torch.zeros(vocab.size, dtype=torch.bool)
    kept[ids] = True
    return {"d2t": ids - torch.arange(len(ids)), "t2d": kept}


def dump(config: DSparkConfig, num_anchors: int = 512) -> dict[str, Any]:
    """The config.json that `read` reads back.

    Raises:
        ConfigError: If the layout cannot say what the module is.
    """
    windows = [window for window in config.backbone.windows if window is not None]
    if any(window != windows[0] or window.moves for window in windows):
        raise ConfigError(
            "sliding windows of a draft must be alike and end at the anchor to be written."
        )
    names = {family: name for name, family in ARCHITECTURES.items()}
    fields = {
        "architectures": [names[config.family]],
        "model_type": "gemma4_text" if config.family == "gemma4" else config.family,
        **dump_layers(config.backbone, config.family),
        "tie_word_embeddings": False,
        "num_anchors": num_anchors,
        "sample_from_anchor": config.sample_from_anchor,
        "target_layer_ids": list(config.target_layer_ids),
        "final_logit_softcapping": config.logit_softcap,
        "shares_target_embedding": not config.owns_embedding,
        "shares_target_head": not config.owns_head,
    }
    for name in (
        "vocab_size",
        "draft_vocab_size",
        "block_size",
        "mask_token_id",
        "target_hidden_size",
        "num_target_layers",
        "markov_rank",
        "markov_head_type",
        "enable_confidence_head",
        "confidence_head_with_markov",
    ):
        fields[name] = getattr(config, name)
    return fields
