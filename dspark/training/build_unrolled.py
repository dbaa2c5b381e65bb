"""From a recipe to an EAGLE-3 or MTP draft: sizes from the target, vocabulary, first weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dspark.draft.eagle3_config import is_eagle3
from dspark.draft.eagle3_format import read_module
from dspark.draft.eagle3_module import Eagle3Config, Eagle3Module
from dspark.draft.formats.fields import read_config
from dspark.errors import CheckpointError, ConfigError
from dspark.target import HeadRows, SharesHeadRows, TargetInfo
from dspark.training.build import (
    backbone_config,
    check_width,
    draft_vocabulary,
    refuse_other,
    spread_layers,
)
from dspark.training.samples import Sample
from dspark.training.sections import DraftSection
from dspark.training.weights import (
    TargetWeights,
    copy_tensor,
    layers_to_copy,
    random_weights,
    start_as_mean,
)

__all__ = ["build_unrolled", "unrolled_config"]

_PROJECTIONS = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")


def unrolled_config(section: DraftSection, info: TargetInfo, folder: Path) -> Eagle3Config:
    """The module's settings.

    Args:
        section: What the recipe says, of kind eagle3 or mtp.
        info: Facts about the target.
        folder: The target's, whose config.json gives the sizes that the recipe leaves out.

    Raises:
        ConfigError: If a value does not fit the target.
    """
    hidden = check_width(section, info)
    layers = backbone_config(section, folder, hidden)
    return Eagle3Config(
        hidden_size=hidden,
        target_hidden_size=info.hidden_size,
        target_layers=_target_layers(section, info),
        intermediate_size=layers.intermediate_size,
        num_heads=layers.num_heads,
        num_kv_heads=layers.num_kv_heads,
        head_dim=layers.head_dim,
        vocab_size=info.vocab_size,
        draft_vocab_size=section.vocabulary or info.vocab_size,
        max_positions=layers.max_positions,
        rms_norm_eps=layers.norm_eps,
        activation=layers.activation,
        rope=layers.rope,
        has_embedding=section.owns_embedding,
        qk_norm=layers.has_qk_norm,
    )


def _target_layers(section: DraftSection, info: TargetInfo) -> tuple[int, ...]:
    if section.kind == "mtp":
        return (info.num_layers - 1,)
    ids = section.target_layer_ids
    if ids is None:
        return spread_layers(info.num_layers, section.target_layers)
    if not ids or len(set(ids)) < len(ids) or not set(ids) <= set(range(-1, info.num_layers)):
        raise ConfigError(
            f"draft.target_layer_ids is {list(ids)}, but must list distinct layers of the target, "
            f"-1 (its embeddings) to {info.num_layers - 1}."
        )
    return ids


def build_unrolled(
    section: DraftSection,
    config: Eagle3Config,
    *,
    target: SharesHeadRows,
    info: TargetInfo,
    folder: Path,
    samples: tuple[Sample, ...],
    seed: int,
) -> tuple[Eagle3Module, HeadRows | None]:
    """Make the module and its first weights, in float32.

    Args:
        section: What the recipe says.
        config: The module's settings.
        target: The target, for what is shared.
        info: Facts about it.
        folder: The target's, for weights to copy.
        samples: Training samples, for the vocabulary.
        seed: Of random weights.

    Returns:
        The module, and rows of the target's head that it predicts with; with them, it has no
        `lm_head`.

    Raises:
        ConfigError: If weights to start from do not fit.
        CheckpointError: If a draft to start from cannot be read.
    """
    start = section.init_from_draft
    stored = None if start is None else _read_draft(Path(start), info)
    if stored is None:
        size = config.draft_vocab_size
        ids = draft_vocabulary(samples, vocab_size=config.vocab_size, count=size)
    else:
        ids = stored.target_ids()
    rows = target.head_rows(ids)
    rows = replace(rows, weight=rows.weight.float())
    if not section.owns_head:
        config = replace(config, logit_softcap=_softcap(section, rows))
    if stored is not None:
        refuse_other(stored.config, config)
        module = stored.float()
    else:
        module = _new_module(config, ids, seed)
        _copy_weights(module, section, TargetWeights(folder), info, rows)
    if section.owns_head:
        return module, None
    del module.lm_head  # a copy of the target's, which is not trained
    return module, rows


def _softcap(section: DraftSection, rows: HeadRows) -> float | None:
    if rows.bias is not None:
        raise ConfigError(
            "draft.owns_head is false, but the target's head has a bias, which a draft of kind "
            f"{section.kind} cannot have.",
            hint="set draft.owns_head = true",
        )
    return rows.softcap


def _new_module(config: Eagle3Config, ids: Tensor | None, seed: int) -> Eagle3Module:
    module = Eagle3Module(config)
    random_weights(module, seed)
    if ids is not None:
        module.d2t.copy_(ids - torch.arange(len(ids)))
    return module


@torch.no_grad()
def _copy_weights(
    module: Eagle3Module,
    section: DraftSection,
    tensors: TargetWeights,
    info: TargetInfo,
    rows: HeadRows,
) -> None:
    """Start from what the target has: its last norm, with its head; a layer, if the recipe says."""
    config = module.config
    starts_from_layer = section.init_from_target is not None
    has_width = config.hidden_size == config.target_hidden_size
    if has_width and (starts_from_layer or not section.owns_head):
        _copy(module, "norm.weight", tensors.last_norm(), "the target's last norm")
        _copy(module, "lm_head.weight", rows.weight, "the target's head")
    if starts_from_layer:
        (source,) = layers_to_copy(section.init_from_target, count=1, total=info.num_layers)
        _copy_layer(module, source, tensors)


def _copy_layer(module: Eagle3Module, source: int, tensors: TargetWeights) -> None:
    """Start the layer as one of the target's, which reads the feature alone.

    The embedding's half of the projections stays as it is, small random numbers.
    """
    hidden, given, norm = module.config.hidden_size, tensors.layer(source), "input_layernorm.weight"
    for name, parameter in module.layers[0].named_parameters():
        if name in given and name != norm:
            part = parameter[:, hidden:] if name in _PROJECTIONS else parameter
            copy_tensor(part, given[name], f"layer {source} of the target, {name}")
    _copy(module, "layers.0.hidden_norm.weight", given.get(norm), f"layer {source}, {norm}")
    first = tensors.layer(0).get(norm)  # which norms embeddings there
    _copy(module, f"layers.0.{norm}", first, f"layer 0, {norm}")
    start_as_mean(module.fc.weight, module.config.target_hidden_size)


def _copy(module: Eagle3Module, name: str, source: Tensor | None, what: str) -> None:
    if source is not None:
        copy_tensor(module.get_parameter(name), source, what)


def _read_draft(folder: Path, info: TargetInfo) -> Eagle3Module:
    if not is_eagle3(read_config(folder)):
        raise CheckpointError(f"{folder / 'config.json'} is not that of an EAGLE-3 draft.")
    return read_module(folder, info)
