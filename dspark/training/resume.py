"""Whether a checkpoint may be gone on from: the recipe must say the same, or say less important."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark.errors import CheckpointError, ConfigError
from dspark.training.recipe import make_recipe
from dspark.training.setup import Setup

__all__ = ["check_resume"]

_FREE = (
    "data.shards",  # the checksum of the data is compared instead
    "run.checkpoint_every",
    "run.validate_every",
    "run.keep",
    "run.cache",
    "run.tensorboard",
)
_NOTED = (
    "run.epochs",
    "run.steps",
    "run.target_quant",
    "schedule.kind",
    "schedule.warmup",
    "schedule.fall",
    "schedule.floor",
    "optimizer.lr",
)
_MISSING = object()


def check_resume(state: Mapping[str, Any], setup: Setup, folder: Path) -> list[str]:
    """Compare a checkpoint with the run that wants to go on from it.

    Args:
        state: The checkpoint's state.json.
        setup: The run's.
        folder: The checkpoint, for messages.

    Returns:
        Notes about what differs and may.

    Raises:
        ConfigError: If something differs that must not.
        CheckpointError: If the checkpoint was written by another version.
    """
    if state.get("version") != 1:
        raise CheckpointError(
            f"{folder} has version {state.get('version')!r}, but this dspark reads 1."
        )
    if state.get("data_sha256") != setup.samples.sha256:
        raise ConfigError(
            f"the run in {folder.parent.parent} was trained on other data.",
            hint="name another --out folder",
        )
    mine = setup.described.get("fingerprint")
    theirs = state.get("target", {}).get("fingerprint")
    if mine != theirs:
        raise ConfigError(
            f"the run in {folder.parent.parent} was trained for another target.",
            hint="name another --out folder",
        )
    notes = []
    old, new = _flat(_completed(state["recipe"])), _flat(setup.recipe.to_json())
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, _MISSING), new.get(key, _MISSING)
        if before == after or key in _FREE:
            continue
        if key not in _NOTED:
            raise ConfigError(
                f"{key} is {after!r}, but the run in {folder.parent.parent} was started with "
                f"{before!r}.",
                hint="name another --out folder",
            )
        notes.append(f"{key} was {before!r} and is {after!r} from here on")
    return notes


def _completed(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint's recipe with today's defaults for keys that its dspark did not have."""
    try:
        return make_recipe(recipe).to_json()
    except ConfigError:
        return recipe  # it has a key that is no more; the comparison names it


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
