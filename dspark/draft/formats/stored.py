"""A draft as its file has it, whatever the layout: what conversion reads and writes.

Nothing of the target is loaded for it: what the target lends (embedding, head) is borrowed
afterwards (borrow.py), and only where a layout wants copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark.draft.dspark_config import DSparkConfig
from dspark.draft.dspark_module import DSparkModule
from dspark.draft.eagle3_config import is_eagle3
from dspark.draft.eagle3_format import read_module
from dspark.draft.eagle3_module import Eagle3Config
from dspark.draft.formats import native
from dspark.draft.formats.detect import check_tensors, is_draft, read_stored
from dspark.draft.formats.fields import read_config, reading
from dspark.errors import CapabilityError, CheckpointError, ConfigError
from dspark.mtp_head import DraftVocab
from dspark.target import HeadRows, TargetInfo

__all__ = ["FACTS", "StoredDraft", "TargetFacts", "facts_of", "read_draft"]

FACTS = "dspark_training"
"""Key of config.json that holds target and training, in layouts other than dspark's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFacts:
    """What a draft's config.json says of its target; None where it says nothing.

    Attributes:
        name: What it is called.
        vocab_size: Its vocabulary.
        hidden_size: Width of its hidden states.
        num_layers: Its decoder layers.
    """

    name: str | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_layers: int | None = None

    def info(self) -> TargetInfo:
        """As much of a target's facts as reading a draft takes.

        Raises:
            ConfigError: If one is not known.
        """
        values = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_target_layers": self.num_layers,
        }
        for name, value in values.items():
            if not isinstance(value, int):
                raise ConfigError(
                    f"the draft does not say {name} of its target.",
                    hint="name the target: --target NAME",
                )
        return TargetInfo(
            name=self.name or "of the draft",
            family="",
            vocab_size=self.vocab_size or 0,
            hidden_size=self.hidden_size or 0,
            num_layers=self.num_layers or 0,
            max_positions=0,
            eos_token_ids=(),
            dtype="float32",
            device="cpu",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDraft:
    """A draft between two layouts.

    Attributes:
        config: Its settings; their kind tells blocks (DSpark, DFlash) from EAGLE-3.
        tensors: By the names that `DSparkModule` or `Eagle3Module` use, as they were stored; int8
            matrices multiplied out.
        vocab: A block's vocabulary; of EAGLE-3 the whole, since its map d2t need not ascend.
        num_target_layers: Decoder layers of the target.
        layout: What it was read from, for people.
        target: What it was trained for, as far as it says.
        training: How, as far as it says.
    """

    config: DSparkConfig | Eagle3Config
    tensors: Mapping[str, Tensor]
    vocab: DraftVocab
    num_target_layers: int
    layout: str
    target: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """DSpark, DFlash or EAGLE-3."""
        if isinstance(self.config, Eagle3Config):
            return "EAGLE-3"
        return "DSpark" if self.config.markov_rank else "DFlash"

    @property
    def has_embedding(self) -> bool:
        """It brings its own embedding."""
        return "embed_tokens.weight" in self.tensors

    @property
    def has_head(self) -> bool:
        """It brings its own output head."""
        return "lm_head.weight" in self.tensors

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest type that holds all its floating-point tensors exactly."""
        found: torch.dtype | None = None
        for tensor in self.tensors.values():
            if tensor.is_floating_point():
                found = tensor.dtype if found is None else torch.promote_types(found, tensor.dtype)
        return found or torch.float32


def facts_of(fields: Mapping[str, Any]) -> TargetFacts:
    """What a draft's config.json says of its target."""
    kept = fields.get(FACTS)
    own = fields.get(native.KEY)
    document = own if isinstance(own, dict) else kept if isinstance(kept, dict) else {}
    target = document.get("target")
    name = target.get("id") if isinstance(target, dict) else None
    inner = fields.get("transformer_layer_config")
    draft = document.get("draft")
    places = [place for place in (draft, fields, inner) if isinstance(place, dict)]
    nested = fields.get("dflash_config")
    places += [nested] if isinstance(nested, dict) else []

    def first(*names: str) -> Any:
        values = (place.get(key) for key in names for place in places)
        return next((value for value in values if value is not None), None)

    return TargetFacts(
        name=name or _verifier(fields),
        vocab_size=first("vocab_size"),
        hidden_size=first("target_hidden_size", "hidden_size"),
        num_layers=first("num_target_layers"),
    )


def _verifier(fields: Mapping[str, Any]) -> str | None:
    config = fields.get("speculators_config")
    verifier = config.get("verifier") if isinstance(config, dict) else None
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    return name if isinstance(name, str) and name else None


def read_draft(folder: Path, info: TargetInfo) -> StoredDraft:
    """Read the draft in a folder as it is stored.

    Args:
        folder: With config.json and safetensors, in any layout that dspark drafts from.
        info: The target that it is for.

    Raises:
        CheckpointError: If it is no draft, or a file, field or tensor does not fit.
        ConfigError: If it was made for another target.
        CapabilityError: If it is of a kind that is not supported.
    """
    fields = read_config(folder)
    if not is_draft(fields):
        raise CheckpointError(
            f"{folder} holds no draft module: config.json is that of a model.",
            hint="engines load a model that drafts as it is",
        )
    own, kept = fields.get(native.KEY), fields.get(FACTS)
    document = own if isinstance(own, dict) else kept if isinstance(kept, dict) else {}
    common: dict[str, Any] = {
        "num_target_layers": info.num_layers,
        "layout": _layout_name(fields),
        "target": document.get("target") or {},
        "training": document.get("training") or {},
    }
    if is_eagle3(fields):
        module = read_module(folder, info)
        vocab = DraftVocab(module.config.vocab_size)  # its map d2t is one of its tensors
        tensors = dict(module.state_dict())
        return StoredDraft(config=module.config, tensors=tensors, vocab=vocab, **common)
    config, ids, stored = read_stored(folder, info)
    with reading(folder / "config.json"), torch.device("meta"):
        wanted = DSparkModule(config, ids, _Absent()).state_dict()
    check_tensors(wanted, stored, folder)
    return StoredDraft(config=config, tensors=stored, vocab=ids, **common)


def _layout_name(fields: Mapping[str, Any]) -> str:
    if native.handles(fields):
        return "dspark"
    if "speculators_model_type" in fields:
        return "speculators"
    names = fields.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "unknown"


class _Absent:
    """Stands for a target whose embedding and head are not asked for."""

    def embed(self, token_ids: Tensor) -> Tensor:
        raise _not_loaded()

    def unembed(self, hidden: Tensor) -> Tensor:
        raise _not_loaded()

    def head_rows(self, ids: Tensor | None = None) -> HeadRows:
        raise _not_loaded()


def _not_loaded() -> CapabilityError:
    return CapabilityError("the target has not been loaded.")
