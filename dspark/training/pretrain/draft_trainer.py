"""Training of a draft module on the frozen target that is shipped, packed weights included."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspark.base_model.checkpoint import Checkpoint
from dspark.base_model.config import V4Config
from dspark.errors import ConfigError
from dspark.training.objective import confidence_rows
from dspark.training.pretrain.attention import Notes
from dspark.training.pretrain.draft_loss import DraftRows, depth_weights, draft_loss
from dspark.training.pretrain.drafts import DSparkNetwork, MTPNetwork
from dspark.training.pretrain.legs import Progress, load_weights
from dspark.training.pretrain.network import (
    V4Network,
    initialise,
    load_official,
    official_tensors,
    rounded_experts,
)
from dspark.training.pretrain.rows import TrainingRows, held_out_rows
from dspark.training.pretrain.settings import DraftRecipe, Recipe, draft_config
from dspark.training.pretrain.tokenizer import Tokens
from dspark.training.pretrain.trainer import add_loads, even_out, make_optimizer
from dspark.training.recipe import LossSection

__all__ = ["DRAFTS", "DraftTraining", "read_target"]

DRAFTS = ("dspark", "mtp")
_VALIDATION = 2**31 - 1  # in the seed of the anchors that validations take


def read_target(folder: Path, config: V4Config) -> V4Network:
    """The target of a checkpoint, weights as packing left them.

    Raises:
        CheckpointError: If it cannot be read or is of another shape.
    """
    checkpoint = Checkpoint.open(folder)
    network = V4Network(config)
    found: dict[str, Tensor] = {}
    for name in official_tensors(network):
        is_weight = name.endswith(".weight") and name.removesuffix("weight") + "scale" in checkpoint
        found[name] = (
            checkpoint.stored(name.removesuffix(".weight")).dequantise(torch.float32)
            if is_weight
            else checkpoint.tensor(name)
        )
    load_official(network, found)
    return network.requires_grad_(False).eval()


class DraftTraining:
    """A draft module, its frozen target and the text; a `legs.Training`.

    Args:
        recipe: What to do.
        kind: One of DRAFTS; the recipe has a section of that name.
        target: From `read_target`.
        tokens: On what.

    Raises:
        ConfigError: If the recipe does not describe this draft.
    """

    def __init__(self, recipe: Recipe, kind: str, target: V4Network, tokens: Tokens) -> None:
        section = {"dspark": recipe.dspark, "mtp": recipe.mtp}.get(kind)
        if section is None:
            raise ConfigError(f"the recipe has no section [{kind}].")
        self.section: DraftRecipe = section
        self.recipe, self.kind, self.target, self.tokens = recipe, kind, target, tokens
        self.config = draft_config(recipe.model, kind)
        self.network: DSparkNetwork | MTPNetwork
        self.network = DSparkNetwork(self.config) if kind == "dspark" else MTPNetwork(self.config)
        initialise(self.network, recipe.run.seed + 1)
        self.optimizer = make_optimizer(recipe, self.network)
        self.rows = TrainingRows(tokens, recipe.run.seed)
        self.progress = Progress()
        self.total = section.steps
        self.validate_every = recipe.run.validate_every
        self.checkpoint_minutes = recipe.run.checkpoint_minutes
        self._loss = LossSection(ce=section.ce, l1=section.l1, confidence=section.confidence)

    @property
    def depths(self) -> int:
        """Tokens ahead that are trained."""
        is_dspark = self.kind == "dspark"
        return self.config.dspark_block_size if is_dspark else self.section.depth

    def advance(self) -> dict[str, Any]:
        """Do one step; figures of it."""
        started = time.monotonic()
        done, section = self.progress, self.section
        first = done.step * section.sequences
        rows = self.rows.at(first, section.sequences, section.length)
        loads: dict[nn.Module, Tensor] = {}
        figures = {"loss": 0.0, "acceptance": 0.0}
        self.network.train()
        # What is packed is trained as it will be: the draft's experts are FP4, too.
        with rounded_experts(self.network):
            for part in self._parts(rows, [self.recipe.run.seed, done.step]):
                share = len(part[0]) / len(rows)
                notes = Notes()
                loss, acceptance = self._losses(*part, notes)
                balance = torch.stack(notes.balance).mean()
                (share * (loss + self.recipe.run.balance * balance)).backward()
                figures["loss"] += share * float(loss.detach())
                figures["acceptance"] += share * float(acceptance[0])
                add_loads(loads, notes)
        factor = self.recipe.schedule.factor(done.step, self.total)
        gradient = self.optimizer.step(factor * section.muon_lr, factor * section.adam_lr)
        uneven = even_out(loads, self.recipe.run.bias_speed)
        size, taken = section.sequences * section.length, time.monotonic() - started
        done.step, done.tokens, done.seconds = (
            done.step + 1,
            done.tokens + size,
            done.seconds + taken,
        )
        rest = {"gradient": gradient, "uneven": uneven, "lr": factor}
        return {**figures, **rest, "tokens_per_second": size / taken}

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Acceptance at every depth on held-out text, by kind: the text's own tokens before it."""
        self.network.eval()
        found: dict[str, Any] = {}
        with rounded_experts(self.network):
            for kind in self.tokens.kinds("held-out"):
                rows = held_out_rows(
                    self.tokens, kind, self.section.length, self.recipe.run.validation_rows
                )
                if not len(rows):
                    continue
                sums = torch.zeros(self.depths)
                for part in self._parts(rows, [self.recipe.run.seed, _VALIDATION]):
                    sums += len(part[0]) * self._losses(*part, Notes())[1]
                found[kind] = (sums / len(rows)).tolist()
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training goes on from."""
        weights = {f"model.{k}": v for k, v in self.network.state_dict().items()}
        return {**weights, **self.optimizer.tensors()}

    def identity(self) -> dict[str, Any]:
        """What must be the same for training to go on from a state."""
        return {
            "model": asdict(self.config),
            "draft": self.kind,
            "seed": self.recipe.run.seed,
            "text": self.tokens.fingerprint(),
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        load_weights(self.network, tensors)
        self.optimizer.load(tensors)

    def _parts(self, rows: Tensor, seed: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and their anchors, as many as run at once."""
        draws = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))
        highest = self.section.length - self.depths + 1  # every depth has a label
        scores = torch.rand(len(rows), highest, generator=draws)
        count = min(self.section.anchors, highest)
        anchors = scores.argsort(dim=1)[:, :count].sort(dim=1).values
        size = self.recipe.run.sequences_per_forward
        yield from zip(rows.split(size), anchors.split(size), strict=True)

    def _losses(self, rows: Tensor, anchors: Tensor, notes: Notes) -> tuple[Tensor, Tensor]:
        """The loss, and the mean acceptance of every depth."""
        wanted = self.config.dspark_target_layer_ids
        with torch.no_grad():
            behind = self.target(rows[:, :-1], Notes(indexer="select"), capture=wanted)
            final = self.target.final(behind.streams).unflatten(0, (len(rows), -1))
        if isinstance(self.network, MTPNetwork):
            return self._mtp_losses(self.network, rows, behind.streams, final, notes)
        captured = torch.cat([behind.captured[layer] for layer in wanted], dim=-1)
        captured = captured.unflatten(0, (len(rows), -1))
        slots = self.depths
        out = self.network(self.target.embed.weight, captured, rows, anchors, notes)
        places = (anchors[:, :, None] + torch.arange(slots)).flatten(1)
        weights = depth_weights(slots, self.section.decay).repeat(anchors.numel())
        weights = weights / anchors.numel()
        compared = DraftRows(
            self.target.head.weight,
            final.gather(1, places[:, :, None].expand(-1, -1, final.shape[-1])).flatten(0, 1),
            rows.gather(1, places + 1).flatten(),
            weights,
            self._loss,
        )
        loss, acceptance = draft_loss(out.normed, out.previous, self.network.markov_w2, compared)
        sure = (weights * confidence_rows(self.network.confidence(out), acceptance)).sum()
        means = acceptance.view(-1, slots).mean(0)
        return loss + self.section.confidence * sure, means

    def _mtp_losses(
        self, network: MTPNetwork, rows: Tensor, streams: Tensor, final: Tensor, notes: Notes
    ) -> tuple[Tensor, Tensor]:
        """Of MTP-1: rows t = 0 .. S - depth - 1, each with all its steps."""
        batch, depth = len(rows), self.depths
        count = rows.shape[1] - 1 - depth
        streams = streams.unflatten(0, (batch, -1))[:, :count].flatten(0, 1)
        embedded = self.target.embed(rows[:, 1 : count + depth])
        outputs = network(embedded, streams, depth, notes)
        none = final.new_empty(batch * count, 0)
        shares = depth_weights(depth, self.section.decay)
        total, means = final.new_zeros(()), []
        for step, hidden in enumerate(outputs):
            compared = DraftRows(
                self.target.head.weight,
                final[:, step + 1 : step + 1 + count].flatten(0, 1),
                rows[:, step + 2 : step + 2 + count].flatten(),
                torch.full((batch * count,), float(shares[step]) / (batch * count)),
                self._loss,
            )
            empty = self.target.head.weight[:, :0]
            loss, acceptance = draft_loss(hidden, none, empty, compared)
            total = total + loss
            means.append(acceptance.mean())
        return total, torch.stack(means)
