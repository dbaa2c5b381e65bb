"""Checkpoints of a run: weights and optimizer state as safetensors, counters as JSON.

    OUT/checkpoints/step-00000120/   weights.safetensors, optimizer.safetensors, state.json

A checkpoint is written under another name and renamed when it is whole; a run that is killed leaves
the one before. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dspark.errors import CheckpointError
from dspark.training.world import full_tensor, like

__all__ = [
    "Checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "load_optimizers",
    "optimizer_tensors",
    "save_checkpoint",
]

_NAME = re.compile(r"step-(\d{8})")
_FOLDER = "checkpoints"


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        weights: Master weights by name.
        optimizer: Optimizer state by "optimizer/parameter/entry".
        state: Counters and what must be the same to go on.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(out: Path, step: int, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint and drop the oldest.

    Args:
        out: The run's folder.
        step: Steps done.
        checkpoint: What to write.
        keep: Checkpoints to keep.

    Returns:
        Its folder.
    """
    root = out / _FOLDER
    folder = root / f"step-{step:08d}"
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, tensors in (("weights", checkpoint.weights), ("optimizer", checkpoint.optimizer)):
        save_file({k: v.contiguous() for k, v in tensors.items()}, part / f"{name}.safetensors")
    (part / "state.json").write_text(json.dumps(checkpoint.state, indent=1), encoding="utf-8")
    for file in part.iterdir():
        _sync(file)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(part, folder)
    _sync(root)
    for _, old in _list(out)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _sync(path: Path) -> None:
    """Have the system write a file or folder to the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _list(out: Path) -> list[tuple[int, Path]]:
    root = out / _FOLDER
    if not root.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in root.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def latest_checkpoint(out: Path) -> Path | None:
    """Folder of the newest checkpoint of a run, None if there is none."""
    every = _list(out)
    return every[-1][1] if every else None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "weights.safetensors")
        optimizer = load_file(folder / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as exc:
        raise CheckpointError(
            f"the checkpoint {folder} cannot be read: {exc}.",
            hint="delete it to go on from the one before",
        ) from exc
    return Checkpoint(weights, optimizer, state)


def optimizer_tensors(
    optimizers: Mapping[str, Optimizer], names: Mapping[int, str]
) -> dict[str, Tensor]:
    """State of optimizers by "optimizer/parameter/entry".

    Args:
        optimizers: By name.
        names: Name of every parameter by its id().
    """
    found = {}
    for kind, optimizer in optimizers.items():
        for parameter, entries in optimizer.state.items():
            for entry, value in entries.items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
                tensor = full_tensor(tensor)
                found[f"{kind}/{names[id(parameter)]}/{entry}"] = tensor
    return found


def load_optimizers(
    optimizers: Mapping[str, Optimizer],
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put state back that `optimizer_tensors` gave.

    Args:
        optimizers: By name.
        parameters: By name.
        tensors: The state.

    Raises:
        CheckpointError: If the state is of other optimizers or parameters.
    """
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        name, _, entry = rest.rpartition("/")
        if kind not in optimizers or name not in parameters:
            raise CheckpointError(f"the checkpoint has optimizer state {key}, which is unknown.")
        parameter = parameters[name]
        own = like(tensor, parameter) if tensor.shape == parameter.shape else tensor
        optimizers[kind].state[parameter][entry] = own.clone()
