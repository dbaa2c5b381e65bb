"""Kinds of drafts that are trained, behind one face: module, layout of anchors, loss, files.

DSpark and DFlash run a block of slots at an anchor (blocks.py) and are stored in dspark's own
layout. EAGLE-3 and MTP are run step by step (unrolled.py) and stored in SafeAILab's EAGLE-3 layout,
which other engines read too, with the facts about the training under `dspark_training`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dspark.draft.dspark_config import DSparkConfig
from dspark.draft.dspark_module import DSparkModule
from dspark.draft.eagle3_config import write_config
from dspark.draft.eagle3_format import save_tensors
from dspark.draft.eagle3_module import Eagle3Module
from dspark.draft.formats.native import save_native
from dspark.target import HeadRows, SharesHeadRows
from dspark.training.blocks import BlockTraining
from dspark.training.network import DraftTraining
from dspark.training.packing import BlockShape
from dspark.training.recipe import LossSection
from dspark.training.unrolled import UnrolledTraining

__all__ = ["BlockDraft", "DraftFacts", "TrainedDraft", "UnrolledDraft"]

FACTS = "dspark_training"
"""Key of config.json, in the EAGLE-3 layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftFacts:
    """What a draft folder says besides weights and settings.

    Attributes:
        target: What it was trained for, as JSON values.
        training: How, as JSON values.
        card: Text of README.md.
    """

    target: Mapping[str, Any]
    training: Mapping[str, Any]
    card: str


class TrainedDraft(Protocol):
    """A draft of some kind that is trained."""

    @property
    def module(self) -> nn.Module:
        """Its module, with the parameters to train."""
        ...

    @property
    def shape(self) -> BlockShape:
        """What it does with an anchor."""
        ...

    @property
    def target_layers(self) -> tuple[int, ...]:
        """Layers of the target that it reads."""
        ...

    @property
    def has_confidence(self) -> bool:
        """It has a confidence head."""
        ...

    @property
    def title(self) -> str:
        """What people call the kind."""
        ...

    def to(self, device: torch.device) -> None:
        """Bring it to a device, with what it has of the target."""
        ...

    def training(self, teacher: SharesHeadRows, loss: LossSection) -> DraftTraining:
        """The module with its loss."""
        ...

    def settings(self) -> list[tuple[str, str]]:
        """What a model card says of it: names and values."""
        ...

    def save(
        self, folder: Path, weights: Mapping[str, Tensor], storage: str, facts: DraftFacts
    ) -> None:
        """Write a draft folder.

        Args:
            folder: Where to; made if missing.
            weights: The module's state dict.
            storage: draft.storage.
            facts: What else the folder says.
        """
        ...


class BlockDraft:
    """DSpark or DFlash.

    Args:
        module: The module, float32.
    """

    def __init__(self, module: DSparkModule) -> None:
        self.module = module

    @property
    def shape(self) -> DSparkConfig:
        """See `TrainedDraft`."""
        return self.module.config

    @property
    def target_layers(self) -> tuple[int, ...]:
        """See `TrainedDraft`."""
        return self.module.config.target_layer_ids

    @property
    def has_confidence(self) -> bool:
        """See `TrainedDraft`."""
        return self.module.config.enable_confidence_head

    @property
    def title(self) -> str:
        """See `TrainedDraft`."""
        return "DSpark" if self.module.config.markov_rank else "DFlash"

    def to(self, device: torch.device) -> None:
        """See `TrainedDraft`."""
        self.module.to(device)
        self.module.take_head_rows()

    def training(self, teacher: SharesHeadRows, loss: LossSection) -> DraftTraining:
        """See `TrainedDraft`."""
        return BlockTraining(self.module, teacher, loss)

    def settings(self) -> list[tuple[str, str]]:
        """See `TrainedDraft`."""
        config = self.module.config
        rank = config.markov_rank
        return [
            ("layers", f"{config.backbone.num_layers}, hidden size {config.backbone.hidden_size}"),
            ("block", f"{config.block_size} slots"),
            ("target layers read", ", ".join(map(str, config.target_layer_ids))),
            ("vocabulary", f"{config.draft_vocab_size} of {config.vocab_size} tokens"),
            ("sequential head", f"rank {rank} ({config.markov_head_type})" if rank else "none"),
            ("confidence head", "yes" if config.enable_confidence_head else "no"),
        ]

    def save(
        self, folder: Path, weights: Mapping[str, Tensor], storage: str, facts: DraftFacts
    ) -> None:
        """Write dspark's own layout; see `TrainedDraft`."""
        save_native(
            folder,
            self.module.config,
            weights,
            vocab_ids=self.module.vocab.ids,
            storage=storage,
            target=facts.target,
            training=facts.training,
            card=facts.card,
        )


@dataclass(frozen=True, slots=True)
class _Steps:
    """The layout of anchors: a slot per step."""

    gamma: int
    first_slot: int = 0
    mask_token_id: int = 0  # of slots that nothing is made of

    @property
    def block_size(self) -> int:
        return self.gamma


class UnrolledDraft:
    """EAGLE-3 or MTP.

    Args:
        module: The module, float32; without `lm_head` where there are `rows`.
        rows: Rows of the target's head that it predicts with, None if it has its own.
        steps: Steps that it is unrolled for.
        num_target_layers: Layers of the target.
    """

    def __init__(
        self, module: Eagle3Module, rows: HeadRows | None, *, steps: int, num_target_layers: int
    ) -> None:
        self.module = module
        self.shape = _Steps(steps)
        self._rows = rows
        self._num_target_layers = num_target_layers

    @property
    def target_layers(self) -> tuple[int, ...]:
        """See `TrainedDraft`."""
        return self.module.config.target_layers

    @property
    def has_confidence(self) -> bool:
        """See `TrainedDraft`."""
        return False

    @property
    def title(self) -> str:
        """See `TrainedDraft`."""
        reads_last = self.target_layers == (self._num_target_layers - 1,)
        return "MTP" if reads_last else "EAGLE-3"

    def to(self, device: torch.device) -> None:
        """See `TrainedDraft`."""
        self.module.to(device)
        if self._rows is not None:
            self._rows = replace(self._rows, weight=self._rows.weight.to(device))

    def training(self, teacher: SharesHeadRows, loss: LossSection) -> DraftTraining:
        """See `TrainedDraft`."""
        return UnrolledTraining(self.module, self._rows, teacher, loss)

    def settings(self) -> list[tuple[str, str]]:
        """See `TrainedDraft`."""
        config = self.module.config
        return [
            ("layers", f"1, hidden size {config.hidden_size}"),
            ("trained for", f"{self.shape.gamma} steps ahead"),
            ("target layers read", ", ".join(map(str, config.target_layers))),
            ("vocabulary", f"{config.draft_vocab_size} of {config.vocab_size} tokens"),
            ("output head", "the target's" if self._rows is not None else "its own"),
        ]

    def save(
        self, folder: Path, weights: Mapping[str, Tensor], storage: str, facts: DraftFacts
    ) -> None:
        """Write the EAGLE-3 layout, the target's head rows included; see `TrainedDraft`."""
        dtype = getattr(torch, storage)
        whole = dict(weights)
        if self._rows is not None:
            whole["lm_head.weight"] = self._rows.weight
        stored = {
            name: tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in whole.items()
        }
        config = self.module.config
        raw = write_config(config, "eagle3", self._num_target_layers, None)
        raw["num_target_layers"] = self._num_target_layers
        raw[FACTS] = {"target": dict(facts.target), "training": dict(facts.training)}
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "README.md.part"
        part.write_text(facts.card, encoding="utf-8")
        os.replace(part, folder / "README.md")
        save_tensors(folder, config, stored, raw, layout="eagle3")
