"""First weights of a draft: random ones, and copies of the target's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from dspark.draft.formats.fields import read_config, read_tensors
from dspark.errors import ConfigError

__all__ = [
    "TargetWeights",
    "copy_tensor",
    "layers_to_copy",
    "main_directions",
    "random_weights",
    "start_as_mean",
]

Layers: TypeAlias = str | tuple[int, ...] | None

_STD = 0.02
_LAYER = "model.layers.{}."
_ONE_MORE = ("gemma", "gemma2", "gemma3")  # whose norms multiply by 1 + weight


def random_weights(module: nn.Module, seed: int) -> None:
    """Fill matrices with normal numbers of deviation 0.02, biases with zeros, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=_STD, generator=generator)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)


class TargetWeights:
    """Tensors of a target's checkpoint, by the names of a plain causal language model.

    Args:
        folder: The target's.
    """

    def __init__(self, folder: Path) -> None:
        found = read_tensors(folder)
        self._tensors = {name.replace("language_model.", ""): t for name, t in found.items()}
        kind = str(read_config(folder).get("model_type", "")).removesuffix("_text")
        self._norm_offset = 1.0 if kind in _ONE_MORE else 0.0

    def layer(self, index: int) -> Mapping[str, Tensor]:
        """Tensors of a decoder layer by their names in it; norms as plain factors."""
        prefix = _LAYER.format(index)
        names = [name for name in self._tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._read(name) for name in names}

    def last_norm(self) -> Tensor | None:
        """Factors of the last norm, None if it is not found."""
        name = "model.norm.weight"
        return self._read(name) if name in self._tensors else None

    def embedding(self) -> Tensor | None:
        """The embedding [V, D], None if it is not found."""
        return self._tensors.get("model.embed_tokens.weight")

    def _read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor + self._norm_offset if name.endswith("norm.weight") else tensor


def layers_to_copy(wanted: Layers, *, count: int, total: int) -> tuple[int, ...]:
    """Layers of the target that a draft's layers start as.

    Args:
        wanted: draft.init_from_target.
        count: Layers of the draft.
        total: Layers of the target.

    Raises:
        ConfigError: If there is no such layer.
    """
    named: Mapping[Layers, tuple[int, ...]] = {
        "first": tuple(range(count)),
        "last": tuple(range(total - count, total)),
    }
    layers = named.get(wanted, wanted)
    if not isinstance(layers, tuple) or any(not 0 <= layer < total for layer in layers):
        raise ConfigError(
            f"draft.init_from_target is {wanted!r}, but the target has layers 0 to {total - 1}."
        )
    return layers


@torch.no_grad()
def copy_tensor(parameter: Tensor, source: Tensor, name: str) -> None:
    """Copy a tensor of the target, in place.

    Raises:
        ConfigError: If the shapes differ.
    """
    if parameter.shape != source.shape:
        raise ConfigError(
            f"{name} is {list(source.shape)}, but the draft's is {list(parameter.shape)}.",
            hint="leave out draft.init_from_target, or give the draft the target's sizes",
        )
    parameter.copy_(source)


@torch.no_grad()
def main_directions(embedding: Tensor, count: int) -> Tensor:
    """The main directions of an embedding [V, D] as float32 [V, count], all of deviation 1.

    A sequential head that starts from them gives like tokens like biases from its first step.
    """
    rows = embedding.float()
    rows = rows - rows.mean(dim=0)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    scale = values[-count:].clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
    directions: Tensor = rows @ (vectors[:, -count:] * scale)
    return directions


@torch.no_grad()
def start_as_mean(weight: Tensor, target_hidden: int) -> None:
    """Start a combiner [D, layers * Dt] as the mean of the layers, where D is Dt; in place."""
    hidden, width = weight.shape
    if hidden == target_hidden:
        count = width // target_hidden
        weight.add_(torch.eye(hidden, device=weight.device).repeat(1, count) / count)
