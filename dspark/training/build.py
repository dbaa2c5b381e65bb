"""From a recipe to a module: sizes from the target, vocabulary from the data, first weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspark.draft.dspark_config import BackboneConfig, DSparkConfig, Window
from dspark.draft.dspark_module import DSparkModule
from dspark.draft.formats import native
from dspark.draft.formats.fields import Fields, read_config, read_tensors, reading
from dspark.draft.formats.layers import read_layers
from dspark.errors import CheckpointError, ConfigError
from dspark.mtp_head import DraftVocab
from dspark.target import SharesHead, TargetInfo
from dspark.training.recipe import DraftSection
from dspark.training.samples import Sample, frequent_tokens
from dspark.training.weights import (
    TargetWeights,
    copy_tensor,
    layers_to_copy,
    main_directions,
    random_weights,
    start_as_mean,
)

__all__ = [
    "backbone_config",
    "build_module",
    "check_width",
    "draft_config",
    "draft_vocabulary",
    "refuse_other",
    "spread_layers",
]

_W1_SIZE = 0.5
"""Deviation of a sequential head's W1 at the start; 0.02 as elsewhere was slower."""


def spread_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Layers of a target to read, spread from the second to the third from last.

    Args:
        num_layers: Layers of the target.
        count: Layers wanted, 1 .. num_layers - 1.

    Raises:
        ConfigError: If the target has too few layers.
    """
    first, last = 1, num_layers - 3
    if last - first + 1 < count:
        first, last = 0, num_layers - 2
    if not 1 <= count <= last - first + 1:
        raise ConfigError(
            f"draft.target_layers is {count}, but must be from 1 to {max(1, num_layers - 1)} for a "
            f"target of {num_layers} layers."
        )
    if count == 1:
        return (last,)
    return tuple(round(first + i * (last - first) / (count - 1)) for i in range(count))


def draft_config(section: DraftSection, info: TargetInfo, folder: Path) -> DSparkConfig:
    """The module's settings.

    Args:
        section: What the recipe says.
        info: Facts about the target.
        folder: The target's, whose config.json gives the sizes that the recipe leaves out.

    Raises:
        ConfigError: If a value does not fit the target.
    """
    hidden = check_width(section, info)
    ids = section.target_layer_ids
    return DSparkConfig(
        family=section.style,
        backbone=backbone_config(section, folder, hidden),
        vocab_size=info.vocab_size,
        draft_vocab_size=section.vocabulary or info.vocab_size,
        block_size=section.block_size,
        sample_from_anchor=section.anchor_predicts,
        mask_token_id=section.mask_token_id,
        target_layer_ids=spread_layers(info.num_layers, section.target_layers)
        if ids is None
        else ids,
        target_hidden_size=info.hidden_size,
        num_target_layers=info.num_layers,
        markov_rank=section.rank,
        markov_head_type=section.markov_head,
        enable_confidence_head=section.has_confidence,
        confidence_head_with_markov=section.has_confidence
        and section.confidence_with_markov
        and section.rank > 0,
        owns_embedding=section.owns_embedding,
        owns_head=section.owns_head,
    )


def check_width(section: DraftSection, info: TargetInfo) -> int:
    """The draft's hidden size.

    Raises:
        ConfigError: If it is not the target's, and the draft shares its embedding or head.
    """
    hidden = section.hidden_size or info.hidden_size
    if hidden != info.hidden_size and not (section.owns_embedding and section.owns_head):
        raise ConfigError(
            f"draft.hidden_size is {hidden}, but must be the target's {info.hidden_size} unless "
            "the draft owns its embedding and head."
        )
    return hidden


def backbone_config(section: DraftSection, folder: Path, hidden: int) -> BackboneConfig:
    """The draft's layers: what the recipe says, and else the target's.

    Args:
        section: What the recipe says.
        folder: The target's.
        hidden: D.

    Raises:
        CheckpointError: If the target's config lacks a size that the recipe leaves out.
    """
    fields = read_config(folder)
    inner = fields.get("text_config")
    text = inner if isinstance(inner, dict) else fields
    values = {**text, "num_hidden_layers": section.layers, "hidden_size": hidden}
    values.pop("layer_types", None)
    values.setdefault("hidden_act", text.get("hidden_activation", "silu"))
    if values["hidden_act"] == "gelu_pytorch_tanh" or text.get("hidden_activation"):
        values["hidden_act"] = text.get("hidden_activation", "gelu_pytorch_tanh")
    names = {
        "intermediate_size": section.intermediate_size,
        "num_attention_heads": section.num_heads,
        "num_key_value_heads": section.num_kv_heads,
        "head_dim": section.head_dim,
    }
    values |= {name: value for name, value in names.items() if value is not None}
    values["attention_bias"] = False
    if section.window is not None:
        values["layer_types"] = ["sliding_attention"] * section.layers
        values["sliding_window"] = section.window
    with reading(folder / "config.json"):
        typed = Fields(values, folder / "config.json")
        return read_layers(typed, section.style, lambda size: Window(size=size))


def build_module(
    section: DraftSection,
    config: DSparkConfig,
    *,
    target: SharesHead,
    folder: Path,
    samples: tuple[Sample, ...],
    seed: int,
) -> DSparkModule:
    """Make the module and its first weights, in float32.

    Args:
        section: What the recipe says.
        config: The module's settings.
        target: The target, for what is shared.
        folder: The target's, for weights to copy.
        samples: Training samples, for the vocabulary.
        seed: Of random weights.

    Raises:
        ConfigError: If weights to start from do not fit.
        CapabilityError: If the target does not give its head's rows away.
    """
    if section.init_from_draft is not None:
        return _from_draft(Path(section.init_from_draft), config, target)
    ids = draft_vocabulary(samples, vocab_size=config.vocab_size, count=config.draft_vocab_size)
    module = DSparkModule(config, DraftVocab.build(config.vocab_size, ids), target)
    _first_weights(module, seed)
    if section.init_from_target is not None or not config.owns_head:
        tensors = TargetWeights(folder)
        last_norm = tensors.last_norm()
        if not config.owns_head and last_norm is not None and module.norm.weight is not None:
            # It reads what the target's last norm gives.
            copy_tensor(module.norm.weight, last_norm, "the target's last norm")
        if section.init_from_target is not None:
            _copy_layers(module, section, tensors)
            _start_head(module, tensors.embedding())
    return module


def draft_vocabulary(
    samples: tuple[Sample, ...], *, vocab_size: int, count: int
) -> torch.Tensor | None:
    """Tokens int64 [count] of a reduced vocabulary, ascending; None where it is the target's."""
    if count == vocab_size:
        return None
    return torch.from_numpy(frequent_tokens(samples, vocab_size=vocab_size, count=count))


def _first_weights(module: DSparkModule, seed: int) -> None:
    random_weights(module, seed)
    if module.markov_head is not None:  # begins as if there were none
        nn.init.zeros_(module.markov_head.markov_w2.weight)
    if module.confidence_head is not None:
        nn.init.zeros_(module.confidence_head.proj.weight)


def _copy_layers(module: DSparkModule, section: DraftSection, tensors: TargetWeights) -> None:
    config = module.config
    wanted = layers_to_copy(
        section.init_from_target, count=config.backbone.num_layers, total=config.num_target_layers
    )
    for layer, source in zip(module.layers, wanted, strict=True):
        given = tensors.layer(source)
        for name, parameter in layer.named_parameters():
            if name in given:
                copy_tensor(parameter, given[name], f"layer {source} of the target, {name}")
    start_as_mean(module.fc.weight, config.target_hidden_size)
    norm = tensors.layer(wanted[0]).get("input_layernorm.weight")
    if norm is not None and module.hidden_norm.weight is not None:
        copy_tensor(module.hidden_norm.weight, norm, f"layer {wanted[0]}, input_layernorm")


def _start_head(module: DSparkModule, embedding: Tensor | None) -> None:
    """Start W1 of the sequential head, where the target's embedding has as many directions."""
    head, vocab_size = module.markov_head, module.config.vocab_size
    if head is None or embedding is None or embedding.shape[0] != vocab_size:
        return
    w1 = head.markov_w1.weight
    if w1.shape[1] <= embedding.shape[1]:
        with torch.no_grad():
            w1.copy_(main_directions(embedding, w1.shape[1]) * _W1_SIZE)


def _from_draft(folder: Path, config: DSparkConfig, target: SharesHead) -> DSparkModule:
    """Go on from a draft folder of the native layout; its vocabulary is kept."""
    where = folder / "config.json"
    fields = read_config(folder)
    if not native.handles(fields):
        raise CheckpointError(f"{where} is no draft of dspark's own layout.")
    tensors = native.unpack(read_tensors(folder), where)
    stored = native.read(fields, where, target.info, tensors)  # type: ignore[attr-defined]
    refuse_other(stored, config)
    shift = tensors.pop("d2t", None)
    ids = None if shift is None else torch.arange(len(shift)) + shift
    module = DSparkModule(config, DraftVocab.build(config.vocab_size, ids), target)
    missing = module.state_dict().keys() ^ tensors.keys()
    if missing:
        raise CheckpointError(f"{folder} and its config differ in tensor {sorted(missing)[0]}.")
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return module


def refuse_other(stored: Any, wanted: Any) -> None:
    """Refuse to start from a draft of other settings than the recipe's.

    Args:
        stored: The draft's config, a dataclass.
        wanted: The recipe's.

    Raises:
        ConfigError: If they differ; it names the first field that does.
    """
    if stored == wanted:
        return
    mine, other = (json.loads(json.dumps(asdict(config))) for config in (wanted, stored))
    wrong = sorted(name for name in mine if mine[name] != other[name])
    raise ConfigError(
        f"draft.init_from_draft names a draft with another {wrong[0]}: {other[wrong[0]]!r}, "
        f"not {mine[wrong[0]]!r}."
    )
