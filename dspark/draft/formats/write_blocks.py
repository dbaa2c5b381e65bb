"""config.json of DSpark and DFlash modules in the layouts of DeepSpec, speculators and SpecForge.

The readers are beside this module, under the layouts' names; what their fields mean is said there.
Tensor names are the same in all of them.
"""

from __future__ import annotations

from typing import Any

from dspark.draft.dspark_config import DSparkConfig
from dspark.draft.formats import deepspec, specforge, speculators
from dspark.draft.formats.layers import dump_layers

__all__ = ["READERS", "SPECULATORS_VERSION", "write_block_config"]

SPECULATORS_VERSION = "0.9.0"
READERS = {
    "deepspec": deepspec.read,
    "speculators": speculators.read,
    "specforge": specforge.read,
}
_LAYER_FIELDS = ("sliding_window_non_causal",)  # the draft's, not its decoder's


def write_block_config(
    config: DSparkConfig, layout: str, *, verifier: str | None, is_flat: bool = False
) -> dict[str, Any]:
    """The config.json of a DSpark or DFlash module.

    Args:
        config: The module's.
        layout: deepspec, speculators or specforge.
        verifier: Name of the target.
        is_flat: For an engine: all names that one may look for, at top level as well.

    Raises:
        ConfigError: If DeepSpec's layout cannot say what the windows are.
    """
    if layout == "deepspec":
        return {**deepspec.dump(config), **(_engine_fields(config) if is_flat else {})}
    if layout == "speculators":
        return _speculators(config, verifier)
    return _specforge(config, is_flat)


def _layers(config: DSparkConfig) -> dict[str, Any]:
    """A plain decoder config, as transformers' own classes take it."""
    fields = dump_layers(config.backbone, config.family)
    return {
        "model_type": "qwen3",
        **{name: value for name, value in fields.items() if name not in _LAYER_FIELDS},
        "use_sliding_window": fields["sliding_window"] is not None,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
    }


def _speculators(config: DSparkConfig, verifier: str | None) -> dict[str, Any]:
    windows = [window for window in config.backbone.windows if window is not None]
    kind = "dspark" if config.markov_rank else "dflash"
    fields: dict[str, Any] = {
        "architectures": ["DSparkSpeculator" if config.markov_rank else "DFlashSpeculator"],
        "speculators_model_type": kind,
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.gamma}],
            "verifier": {"name_or_path": verifier, "architectures": []},
        },
        "transformer_layer_config": _layers(config),
        "draft_vocab_size": config.draft_vocab_size,
        "block_size": config.block_size,
        "target_hidden_size": config.target_hidden_size,
        "aux_hidden_state_layer_ids": [layer + 1 for layer in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        # Without windows vLLM still takes its opposite for all layers, which are not causal.
        "sliding_window_non_causal": not (windows and windows[0].is_causal),
        "sample_from_anchor": config.sample_from_anchor,
        "num_target_layers": config.num_target_layers,
    }
    if config.markov_rank:
        fields |= {name: getattr(config, name) for name in _HEADS}
    return fields


_HEADS = (
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
)


def _specforge(config: DSparkConfig, is_flat: bool) -> dict[str, Any]:
    is_dspark = bool(config.markov_rank)
    nested: dict[str, Any] = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
    }
    if is_dspark:
        nested |= {
            "attention_mode": "gqa",
            "projector_type": "dspark",
            "confidence_head_alpha": 1.0 if config.enable_confidence_head else 0.0,
            **{name: getattr(config, name) for name in _HEADS},
        }
    fields: dict[str, Any] = {
        "architectures": ["DSparkDraftModel" if is_dspark else "DFlashDraftModel"],
        **_layers(config),
        "block_size": config.block_size,
        "num_target_layers": config.num_target_layers,
        "dflash_config": nested,
    }
    if is_flat:
        names = ("mask_token_id", "target_layer_ids", *(_HEADS if is_dspark else ()))
        fields |= {name: nested[name] for name in names}
        fields |= _engine_fields(config)
    return fields


def _engine_fields(config: DSparkConfig) -> dict[str, Any]:
    return {
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "sample_from_anchor": config.sample_from_anchor,
        "dspark_bonus_anchor": not config.sample_from_anchor,  # vLLM's older name
    }
