"""Optimizers and learning-rate schedules of a recipe.

**Source:** Muon for hidden matrices and AdamW for the rest as in the DeepSeek-V4 report, section
2.4; schedules: warm-up and cosine (DeepSpec), warm-up, stable, decay (Hu et al., 2404.06395).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from dspark.training.muon import Muon
from dspark.training.recipe import OptimizerSection, ScheduleSection

__all__ = ["learning_rate", "make_optimizers", "set_learning_rate"]

_HIDDEN = ("layers.", "fc.")  # matrices that hold no vocabulary


def make_optimizers(
    named: Iterable[tuple[str, nn.Parameter]], section: OptimizerSection
) -> dict[str, Optimizer]:
    """Optimizers by name, together covering all parameters.

    Args:
        named: Parameters to train, with the module's names.
        section: What the recipe says.
    """
    matrices, hidden, rest = [], [], []
    for name, parameter in named:
        if parameter.ndim < 2:
            rest.append(parameter)
        elif section.kind == "muon" and name.startswith(_HIDDEN):
            hidden.append(parameter)
        else:
            matrices.append(parameter)
    decay = section.weight_decay
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    made: dict[str, Optimizer] = {}
    if groups:
        betas = (section.betas[0], section.betas[1])
        made["adamw"] = torch.optim.AdamW(
            groups, lr=section.lr, betas=betas, eps=section.eps, fused=True
        )
    if hidden:
        made["muon"] = Muon(hidden, lr=section.lr, weight_decay=decay)
    return made


def learning_rate(section: ScheduleSection, peak: float, step: int, total: int) -> float:
    """Learning rate of a step.

    Args:
        section: The schedule.
        peak: Highest rate.
        step: From 0.
        total: Steps of the run.
    """
    warmup = round(section.warmup * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if section.kind == "cosine":
        done = (step - warmup) / max(1, total - warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    else:
        fall = max(1, round(section.fall * total))
        share = min(1.0, (total - step) / fall)
    return peak * (section.floor + (1 - section.floor) * share)


def set_learning_rate(optimizers: Iterable[Optimizer], rate: float) -> None:
    """Set the rate of all parameters."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
