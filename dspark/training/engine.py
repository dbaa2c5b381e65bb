"""One optimizer step: forwards over parts of the step's samples, gradients, the update."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from dspark.errors import CheckpointError
from dspark.training.checkpoints import load_optimizers, optimizer_tensors
from dspark.training.metrics import SUMS
from dspark.training.optimizing import make_optimizers, set_learning_rate
from dspark.training.packing import Packed, pack, position_weights, total_weight
from dspark.training.samples import IntArray, Sample
from dspark.training.setup import Setup, autocast
from dspark.training.world import ALONE, World, full_tensor, like

__all__ = ["Anchored", "StepEngine", "StepResult"]

Anchored: TypeAlias = tuple[Sample, IntArray]
"""A sample and its anchors."""


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What a step did.

    Attributes:
        sums: float64 [len(SUMS), G], see `dspark.training.metrics`.
        gradient: Length of the gradient before clipping.
        is_skipped: Loss or gradient was not finite, so nothing was changed.
        target_seconds: Time in the target or reading its features.
    """

    sums: Tensor
    gradient: float
    is_skipped: bool
    target_seconds: float


class StepEngine:
    """Runs steps.

    Args:
        setup: What the run works with.
        world: The processes that share the work.
    """

    def __init__(self, setup: Setup, world: World = ALONE) -> None:
        recipe = setup.recipe
        self._setup = setup
        self._shape = setup.draft.shape
        self._world = world
        self._network = setup.draft.training(setup.head, recipe.loss).to(setup.device)
        world.shard(self._network)
        self._parameters = dict(setup.module.named_parameters())
        self._optimizers = make_optimizers(self._parameters.items(), recipe.optimizer)
        self._weights = position_weights(self._shape.gamma, recipe.loss.decay)
        self._target_seconds = 0.0

    @property
    def terms(self) -> tuple[float, float, float]:
        """Weights of CE, L1 and BCE in the loss."""
        loss = self._setup.recipe.loss
        confidence = loss.confidence if self._setup.draft.has_confidence else 0.0
        return loss.ce, loss.l1, confidence

    def step(self, anchored: Sequence[Anchored], rate: float) -> StepResult:
        """One optimizer step.

        Args:
            anchored: The step's samples.
            rate: Learning rate.
        """
        self._target_seconds = 0.0
        scale = 1.0 / total_weight(anchored, self._shape.gamma, self._weights)
        sums = torch.zeros(len(SUMS), self._shape.gamma, dtype=torch.float64)
        for part, counts in self._world.deal(self._parts(anchored)):
            packed = self._pack(part)
            with autocast(self._setup.dtype, self._setup.device):
                # Gradients are averaged over processes, but are to be added up.
                loss, found = self._network(packed, counts * scale * self._world.size)
            sums += counts * found
            loss.backward()
        sums = self._world.sum(sums)
        clip = self._setup.recipe.optimizer.clip
        length = torch.nn.utils.clip_grad_norm_(
            self._parameters.values(), math.inf if clip is None else clip
        )
        gradient = float(full_tensor(length))
        is_sound = math.isfinite(gradient) and bool(torch.isfinite(sums).all())
        if is_sound:
            set_learning_rate(self._optimizers.values(), rate)
            for optimizer in self._optimizers.values():
                optimizer.step()
        for parameter in self._parameters.values():
            parameter.grad = None
        return StepResult(sums, gradient, not is_sound, self._target_seconds)

    @torch.no_grad()
    def evaluate(self, anchored: Sequence[Anchored]) -> Tensor:
        """Sums for figures over samples, without training on them."""
        sums = torch.zeros(len(SUMS), self._shape.gamma, dtype=torch.float64)
        for part, counts in self._world.deal(self._parts(anchored)):
            packed = self._pack(part)
            with autocast(self._setup.dtype, self._setup.device):
                sums += counts * self._network(packed, 1.0)[1]
        return self._world.sum(sums)

    def weights(self) -> dict[str, Tensor]:
        """The module's state dict."""
        state: dict[str, Tensor] = self._setup.module.state_dict()
        return {name: full_tensor(tensor.detach()) for name, tensor in state.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """State of the optimizers by name."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        return optimizer_tensors(self._optimizers, names)

    def load(
        self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], where: Path
    ) -> None:
        """Put back what a checkpoint holds.

        Raises:
            CheckpointError: If it is of another module.
        """
        own = self._setup.module.state_dict()
        laid = {name: like(w, own[name]) if name in own else w for name, w in weights.items()}
        try:
            self._setup.module.load_state_dict(laid)
        except RuntimeError as exc:
            reason = str(exc).strip().splitlines()[-1].strip()
            raise CheckpointError(f"the checkpoint {where} does not fit: {reason}") from exc
        load_optimizers(self._optimizers, self._parameters, optimizer)

    def _parts(self, anchored: Sequence[Anchored]) -> list[list[Anchored]]:
        """Samples in parts of about as many tokens as the recipe allows a forward."""
        limit = self._setup.recipe.run.tokens_per_forward
        parts: list[list[Anchored]] = []
        tokens = 0
        for item in anchored:
            if not parts or tokens + item[0].length > limit:
                parts.append([])
                tokens = 0
            parts[-1].append(item)
            tokens += item[0].length
        return parts

    def _pack(self, part: Sequence[Anchored]) -> Packed:
        began = time.perf_counter()
        features = self._setup.source.get([sample for sample, _ in part])
        self._target_seconds += time.perf_counter() - began
        return pack(part, features, self._shape, self._weights, device=self._setup.device)
