"""Checks of a model folder before anything is loaded from it.

Reads the config, the safetensors headers and the shard index, never the weights themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dspark.errors import CheckpointError

__all__ = ["check_checkpoint"]

_KINDS = ("model_type", "speculators_model_type")
"""Fields that say what a folder holds: a model, or a draft in the layout of speculators."""
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_checkpoint(folder: Path) -> None:
    """Check that a folder holds a config and whole safetensors files.

    Args:
        folder: A local folder in the Hugging Face layout.

    Raises:
        CheckpointError: If the config is missing or not valid, if there are no safetensors
            weights, or if one of the files is missing, cut short or not a safetensors file; the
            message names the file.
    """
    config = _read_json(folder / "config.json", missing="so it is not a model folder")
    if not any(isinstance(config.get(name), str) for name in _KINDS):
        raise CheckpointError(f"{folder / 'config.json'} does not say its model_type.")
    index = folder / _INDEX
    if index.is_file():
        _check_shards(index)
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise _no_weights(folder)
    for path in files:
        _tensor_names(path)


def _no_weights(folder: Path) -> CheckpointError:
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        return CheckpointError(
            f"{folder} holds only pickled weights, which can run code; only safetensors are read.",
            hint="convert them with transformers: model.save_pretrained(FOLDER)",
        )
    gguf = next(folder.glob("*.gguf"), None)
    return CheckpointError(
        f"{folder} holds no *.safetensors weights.",
        hint=f"to use the GGUF file, name it: {gguf}" if gguf else None,
    )


def _check_shards(index: Path) -> None:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map, so the weights cannot be found.")
    for shard in sorted({str(name) for name in weight_map.values()}):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names the shard {shard!r}, which is not a file name.")
        path = index.parent / shard
        if not path.is_file():
            raise CheckpointError(f"{index.name} names the shard {path}, which is missing.")
        lost = {key for key, name in weight_map.items() if name == shard} - _tensor_names(path)
        if lost:
            raise CheckpointError(f"{path} lacks {min(lost)}, which {index.name} says it holds.")


def _tensor_names(path: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

    try:
        # Opening checks the header and that the file is as long as the header says.
        with safe_open(str(path), framework="numpy") as file:
            return set(file.keys())
    except (SafetensorError, OSError, ValueError) as exc:
        reason = str(exc).removeprefix("Error while deserializing header: ") or "it is empty"
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({reason}).",
            hint="copy or download it again",
        ) from exc


def _read_json(path: Path, missing: str = "") -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        tail = f", {missing}" if missing else ""
        raise CheckpointError(f"{path.parent} has no {path.name}{tail}.") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} cannot be read as JSON ({exc}).") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return value
