"""Training of the target."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspark.base_model.config import V4Config
from dspark.errors import CheckpointError
from dspark.training.pretrain.attention import Notes
from dspark.training.pretrain.legs import Progress, load_weights
from dspark.training.pretrain.network import (
    V4Network,
    fill_hash_tables,
    initialise,
    rounded_experts,
)
from dspark.training.pretrain.optimizer import MuonAdamW
from dspark.training.pretrain.rows import TrainingRows, held_out_rows
from dspark.training.pretrain.settings import Recipe, Stage, draft_config
from dspark.training.pretrain.state import find_state, load_state
from dspark.training.pretrain.tokenizer import Tokens

__all__ = ["TargetTraining", "even_out", "load_network", "make_optimizer", "text_losses"]


class TargetTraining:
    """Network, optimizer and text of a run; a `legs.Training`.

    Between legs the recipe's stages, schedule and learning rates may change; model, seed and text
    may not.

    Args:
        recipe: What to do.
        tokens: On what.
    """

    def __init__(self, recipe: Recipe, tokens: Tokens) -> None:
        self.recipe, self.tokens = recipe, tokens
        self.network = _new_network(recipe, tokens)
        self.optimizer = make_optimizer(recipe, self.network)
        self.rows = TrainingRows(tokens, recipe.run.seed)
        self.progress = Progress()
        self.total = recipe.total_steps
        self.validate_every = recipe.run.validate_every
        self.checkpoint_minutes = recipe.run.checkpoint_minutes

    def advance(self) -> dict[str, Any]:
        """Do one step; figures of it."""
        started = time.monotonic()
        done, stage, run = self.progress, self.recipe.stage_at(self.progress.step), self.recipe.run
        # Where the text goes on, whatever the lengths before.
        rows = self.rows.at(done.tokens // stage.length, stage.sequences, stage.length)
        figures = {"loss": 0.0, "index": 0.0, "balance": 0.0}
        loads: dict[nn.Module, Tensor] = {}
        self.network.train()
        with rounded_experts(self.network, enabled=stage.experts == "fp4"):
            for part in rows.split(run.sequences_per_forward):
                self._backward(part, len(part) / len(rows), stage, figures, loads)
        factor = self.recipe.schedule.factor(done.step, self.total)
        wanted = self.recipe.optimizer
        gradient = self.optimizer.step(factor * wanted.muon_lr, factor * wanted.adam_lr)
        uneven = even_out(loads, run.bias_speed)
        size, taken = rows.shape[0] * stage.length, time.monotonic() - started
        done.step, done.tokens, done.seconds = (
            done.step + 1,
            done.tokens + size,
            done.seconds + taken,
        )
        return {
            **figures,
            "gradient": gradient,
            "uneven": uneven,
            "lr": factor,
            "tokens_per_second": size / taken,
        }

    def _backward(
        self,
        rows: Tensor,
        share: float,
        stage: Stage,
        figures: dict[str, float],
        loads: dict[nn.Module, Tensor],
    ) -> None:
        """Add the gradients of some of a step's rows."""
        run, notes = self.recipe.run, Notes(indexer=stage.indexer)
        text = self.network.loss(rows[:, :-1], rows[:, 1:], notes)
        balance, index = _mean(notes.balance), _mean(notes.index)
        (share * (text + run.balance * balance + run.index * index)).backward()
        for name, value in (("loss", text), ("balance", balance), ("index", index)):
            figures[name] += share * float(value.detach())
        add_loads(loads, notes)

    def validate(self) -> dict[str, Any]:
        """Held-out loss in nats a token by kind of text, in the way of the last step's stage."""
        stage = self.recipe.stage_at(max(self.progress.step - 1, 0))
        return text_losses(self.network, self.tokens, stage, rows=self.recipe.run.validation_rows)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training goes on from."""
        weights = {f"model.{k}": v for k, v in self.network.state_dict().items()}
        return {**weights, **self.optimizer.tensors()}

    def identity(self) -> dict[str, Any]:
        """What must be the same for training to go on from a state."""
        return {
            "model": asdict(draft_config(self.recipe.model, "none")),
            "seed": self.recipe.run.seed,
            "text": self.tokens.fingerprint(),
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        load_weights(self.network, tensors)
        self.optimizer.load(tensors)


@torch.no_grad()
def text_losses(network: V4Network, tokens: Tokens, stage: Stage, *, rows: int) -> dict[str, float]:
    """Held-out loss in nats a token by kind of text, in a stage's way."""
    network.eval()
    found = {}
    with rounded_experts(network, enabled=stage.experts == "fp4"):
        for kind in tokens.kinds("held-out"):
            losses = [
                float(network.loss(row[None, :-1], row[None, 1:], Notes(indexer=stage.indexer)))
                for row in held_out_rows(tokens, kind, stage.length, rows)
            ]
            if losses:
                found[kind] = sum(losses) / len(losses)
    return found


def make_optimizer(recipe: Recipe, module: nn.Module, skip: tuple[str, ...] = ()) -> MuonAdamW:
    """The optimizer of a module's parameters, but of those with a name in `skip`."""
    wanted = recipe.optimizer
    named = [(n, p) for n, p in module.named_parameters() if n not in skip]
    return MuonAdamW(
        named,
        momentum=wanted.momentum,
        betas=(wanted.betas[0], wanted.betas[1]),
        weight_decay=wanted.weight_decay,
        clip=wanted.clip,
        newton_schulz=(wanted.newton_schulz[0], wanted.newton_schulz[1]),
    )


def add_loads(loads: dict[nn.Module, Tensor], notes: Notes) -> None:
    """Add the loads of a forward to those of the step."""
    for router, counts in notes.loads:
        more = torch.tensor(counts, dtype=torch.float64)
        loads[router] = loads[router] + more if router in loads else more


@torch.no_grad()
def even_out(loads: dict[nn.Module, Tensor], speed: float) -> float:
    """Move the routers' biases towards an even load; the largest load over the mean."""
    worst = 0.0
    for router, counts in loads.items():
        mean = counts.mean()
        bias = router.get_buffer("bias")
        bias += speed * torch.sign(mean - counts).to(bias.dtype)
        worst = max(worst, float(counts.max() / mean))
    return worst


def load_network(config: V4Config, folder: Path) -> tuple[V4Network, dict[str, Any]]:
    """The network of a run's newest state, and the state's note.

    Raises:
        CheckpointError: If there is none, or it is of another model.
    """
    path = find_state(folder)
    if path is None:
        raise CheckpointError(f"{folder} holds no state of training.")
    tensors, note = load_state(path)
    network = V4Network(config)
    load_weights(network, tensors)
    return network.eval(), note


def _new_network(recipe: Recipe, tokens: Tokens) -> V4Network:
    """The network at its start."""
    network = V4Network(recipe.model)
    initialise(network, recipe.run.seed)
    counts = torch.zeros(recipe.model.vocab_size, dtype=torch.int64)
    for kind in tokens.kinds("train"):
        ids = torch.from_numpy(tokens.streams["train", kind].tokens.astype("int64"))
        counts += torch.bincount(ids, minlength=recipe.model.vocab_size)
    fill_hash_tables(network, counts)
    return network


def _mean(losses: list[Tensor]) -> Tensor:
    """Mean over layers; 0 without any."""
    return torch.stack(losses).mean() if losses else torch.zeros(())
