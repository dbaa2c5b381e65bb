"""From a recipe to a module: sizes from the target, vocabulary from the data, first weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspark.draft.backbone import RMSNorm
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

__all__ = ["build_module", "draft_config", "spread_layers"]

_STD = 0.02
_LAYER = "model.layers.{}."


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
    fields = read_config(folder)
    inner = fields.get("text_config")
    text = inner if isinstance(inner, dict) else fields
    hidden = section.hidden_size or info.hidden_size
    if hidden != info.hidden_size and not (section.owns_embedding and section.owns_head):
        raise ConfigError(
            f"draft.hidden_size is {hidden}, but must be the target's {info.hidden_size} unless "
            "the draft owns its embedding and head."
        )
    ids = section.target_layer_ids
    return DSparkConfig(
        family=section.style,
        backbone=_backbone(section, text, folder, hidden),
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


def _backbone(
    section: DraftSection, text: dict[str, Any], folder: Path, hidden: int
) -> BackboneConfig:
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
        fields = Fields(values, folder / "config.json")
        return read_layers(fields, section.style, lambda size: Window(size=size))


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
    ids = None
    if config.draft_vocab_size != config.vocab_size:
        tokens = frequent_tokens(
            samples, vocab_size=config.vocab_size, count=config.draft_vocab_size
        )
        ids = torch.from_numpy(tokens)
    if section.init_from_draft is not None:
        return _from_draft(Path(section.init_from_draft), config, target)
    module = DSparkModule(config, DraftVocab.build(config.vocab_size, ids), target)
    _first_weights(module, seed)
    if section.init_from_target is not None or not config.owns_head:
        tensors = _decoder_tensors(read_tensors(folder))
        if not config.owns_head:  # it reads what the target's last norm gives
            _copy_norm(module.norm, tensors.get("model.norm.weight"), "the target's last norm")
        if section.init_from_target is not None:
            _copy_layers(module, section, tensors)
    return module


def _first_weights(module: DSparkModule, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=_STD, generator=generator)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
    if module.markov_head is not None:  # begins as if there were none
        nn.init.zeros_(module.markov_head.markov_w2.weight)
    if module.confidence_head is not None:
        nn.init.zeros_(module.confidence_head.proj.weight)


def _decoder_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a checkpoint by the names of a plain causal language model."""
    return {name.replace("language_model.", ""): tensor for name, tensor in tensors.items()}


def _copy_layers(module: DSparkModule, section: DraftSection, tensors: dict[str, Tensor]) -> None:
    total = module.config.num_target_layers
    count = module.config.backbone.num_layers
    wanted = section.init_from_target
    if wanted == "first":
        wanted = tuple(range(count))
    elif wanted == "last":
        wanted = tuple(range(total - count, total))
    if not isinstance(wanted, tuple) or any(not 0 <= layer < total for layer in wanted):
        raise ConfigError(
            f"draft.init_from_target is {wanted!r}, but the target has layers 0 to {total - 1}."
        )
    for layer, source in zip(module.layers, wanted, strict=True):
        for name, parameter in layer.named_parameters():
            full = _LAYER.format(source) + name
            if full in tensors:
                _copy(parameter, tensors[full], f"layer {source} of the target, {name}")
    _mean_of_layers(module)
    name = _LAYER.format(wanted[0]) + "input_layernorm.weight"
    _copy_norm(module.hidden_norm, tensors.get(name), name)


def _copy_norm(norm: RMSNorm, source: Tensor | None, name: str) -> None:
    if source is not None and norm.weight is not None:
        _copy(norm.weight, source, name)


@torch.no_grad()
def _mean_of_layers(module: DSparkModule) -> None:
    """Start the combiner as the mean of the captured layers, where the widths allow it."""
    config, weight = module.config, module.fc.weight
    hidden, count = config.backbone.hidden_size, len(config.target_layer_ids)
    if hidden == config.target_hidden_size:
        weight.add_(torch.eye(hidden).repeat(1, count) / count)


@torch.no_grad()
def _copy(parameter: Tensor, source: Tensor, name: str) -> None:
    if parameter.shape != source.shape:
        raise ConfigError(
            f"{name} is {list(source.shape)}, but the draft's is {list(parameter.shape)}.",
            hint="leave out draft.init_from_target, or give the draft the target's sizes",
        )
    parameter.copy_(source)


def _from_draft(folder: Path, config: DSparkConfig, target: SharesHead) -> DSparkModule:
    """Go on from a draft folder of the native layout; its vocabulary is kept."""
    where = folder / "config.json"
    fields = read_config(folder)
    if not native.handles(fields):
        raise CheckpointError(f"{where} is no draft of dspark's own layout.")
    tensors = native.unpack(read_tensors(folder), where)
    stored = native.read(fields, where, target.info, tensors)  # type: ignore[attr-defined]
    if stored != config:
        mine, other = (json.loads(json.dumps(_plain(c))) for c in (config, stored))
        wrong = sorted(name for name in mine if mine[name] != other[name])
        raise ConfigError(
            f"draft.init_from_draft names a draft with another {wrong[0]}: {other[wrong[0]]!r}, "
            f"not {mine[wrong[0]]!r}."
        )
    shift = tensors.pop("d2t", None)
    ids = None if shift is None else torch.arange(len(shift)) + shift
    module = DSparkModule(config, DraftVocab.build(config.vocab_size, ids), target)
    missing = module.state_dict().keys() ^ tensors.keys()
    if missing:
        raise CheckpointError(f"{folder} and its config differ in tensor {sorted(missing)[0]}.")
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return module


def _plain(config: DSparkConfig) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(config)
