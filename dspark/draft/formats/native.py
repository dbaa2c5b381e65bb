"""The layout that `dspark train` writes: small, complete, and made for the loader.

    config.json        {"model_type": "dspark_draft", "dspark_draft": {"version": 1,
                        "draft": {...}, "target": {...}, "training": {...}}}; `draft` holds the
                       fields of `DSparkConfig`
    draft.safetensors  the module's tensors; matrices may be int8 with a scale per row
                       (`NAME.scale`); `vocab_ids` where the vocabulary is reduced
    README.md          the model card

What the target shares is not stored: with a reduced vocabulary and the target's head, only the ids.

**Rounding.** An int8 row holds round(w / s) with s = max |w| / 127, so an element is off by s / 2
at the most.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dspark.draft.dspark_config import BackboneConfig, DSparkConfig, Window
from dspark.draft.dspark_module import DSparkModule
from dspark.draft.formats.fields import Fields
from dspark.errors import CheckpointError, ConfigError
from dspark.target import TargetInfo

__all__ = [
    "KEY",
    "STORAGES",
    "VERSION",
    "handles",
    "read",
    "save_module",
    "save_native",
    "unpack",
]

KEY = "dspark_draft"
VERSION = 1
STORAGES = ("bfloat16", "float32", "int8")
"""How matrices are stored; with int8, all else is bfloat16."""

_SCALE = ".scale"
_IDS = "vocab_ids"


def handles(config: Mapping[str, Any]) -> bool:
    """True for a config.json of this layout."""
    return KEY in config


def read(
    config: Mapping[str, Any], where: Path, info: TargetInfo, tensors: Mapping[str, Tensor]
) -> DSparkConfig:
    """Read a config.json; everything is in it, so `info` and `tensors` are not looked at.

    Raises:
        CheckpointError: If a field is missing, unknown or wrong, or the version is not known.
    """
    top = Fields(Fields(config, where).mapping(KEY), where)
    version = top.integer("version")
    if version != VERSION:
        raise CheckpointError(
            f"{where}: version of {KEY} is {version}, but this dspark reads {VERSION}.",
            hint="update dspark",
        )
    values = dict(top.mapping("draft"))
    backbone = dict(Fields(values, where).mapping("backbone"))
    windows = backbone.get("windows")
    if not isinstance(windows, list):
        raise CheckpointError(f"{where}: windows is {windows!r}, but must be a list.")
    backbone["windows"] = tuple(
        None if item is None else _make(Window, item, where) for item in windows
    )
    values["backbone"] = _make(BackboneConfig, backbone, where)
    values["target_layer_ids"] = Fields(values, where).integers("target_layer_ids")
    made: DSparkConfig = _make(DSparkConfig, values, where)
    return made


def _make(kind: Any, values: Any, where: Path) -> Any:
    """One of the config classes from its fields."""
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{where}: {values!r} must be an object.")
    known = {item.name: str(item.type) for item in fields(kind)}
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise CheckpointError(f"{where}: {unknown[0]} is no field of {kind.__name__}.")
    typed = Fields(values, where)
    for name, value in values.items():
        if value is not None:
            _check_type(typed, name, known[name])
    try:
        return kind(**values)
    except TypeError as exc:
        raise CheckpointError(f"{where}: {KEY} lacks a field: {exc}.") from exc


def _check_type(typed: Fields, name: str, kind: str) -> None:
    """Refuse a field whose value is not of the type that its class declares."""
    checks: dict[str, Callable[[str], object]] = {
        "int": typed.integer,
        "bool": typed.boolean,
        "str": typed.text,
        "float": typed.number,
        "float | None": typed.number,
        "Mapping[str, Any]": typed.mapping,
    }
    if kind in checks:
        checks[kind](name)


def unpack(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Stored tensors as the module's: int8 matrices multiplied out, ids as the map d2t.

    Raises:
        CheckpointError: If a scale does not fit its matrix.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in tensors:
            continue
        scale = tensors.get(name + _SCALE)
        if name == _IDS:
            ids = tensor.to(torch.int64)
            plain["d2t"] = ids - torch.arange(ids.numel())
        elif scale is None:
            plain[name] = tensor
        elif tensor.dtype is not torch.int8 or scale.shape != tensor.shape[:1]:
            raise CheckpointError(
                f"{where}: {name}{_SCALE} is {list(scale.shape)} for {tensor.dtype} "
                f"{list(tensor.shape)}, but must be one scale for each row of int8."
            )
        else:
            plain[name] = tensor.float() * scale.float()[:, None]
    return plain


def _pack(name: str, tensor: Tensor, storage: str) -> dict[str, Tensor]:
    tensor = tensor.detach().cpu()
    if storage != "int8" or tensor.ndim != 2:
        dtype = torch.float32 if storage == "float32" else torch.bfloat16
        return {name: tensor.to(dtype).contiguous()}
    scale = (tensor.float().abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (tensor.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {name: rounded.contiguous(), name + _SCALE: scale}


def save_native(
    folder: str | Path,
    config: DSparkConfig,
    tensors: Mapping[str, Tensor],
    *,
    vocab_ids: Tensor | None = None,
    storage: str = "bfloat16",
    target: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> Path:
    """Write a draft folder.

    Weights go first and the config last, each by a temporary name, so that a folder with a config
    is whole.

    Args:
        folder: Where to; made if missing.
        config: The module's.
        tensors: Its state dict.
        vocab_ids: int64 [Vd], where the vocabulary is reduced.
        storage: One of STORAGES.
        target: What it was trained for, as JSON values.
        training: How, as JSON values.
        card: Text of README.md.

    Returns:
        The folder.

    Raises:
        ConfigError: If the storage is unknown.
    """
    if storage not in STORAGES:
        raise ConfigError(f"storage is {storage!r}, but must be one of {', '.join(STORAGES)}.")
    folder = Path(folder)
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stored |= _pack(name, tensor, storage)
    if vocab_ids is not None:
        stored[_IDS] = vocab_ids.to("cpu", torch.int32)
    document = {
        "architectures": ["DSparkDraft"],
        "model_type": KEY,  # every model folder says one
        KEY: {
            "version": VERSION,
            "draft": asdict(config),
            "target": dict(target or {}),
            "training": dict(training or {}),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "draft.safetensors.part"
    save_file(stored, part, metadata={"format": "pt"})
    os.replace(part, folder / "draft.safetensors")
    if card is not None:
        _write_text(folder / "README.md", card)
    _write_text(folder / "config.json", json.dumps(document, indent=2) + "\n")
    return folder


def save_module(folder: str | Path, module: DSparkModule, **options: Any) -> Path:
    """Write a module in this layout; see `save_native` for the options."""
    return save_native(
        folder, module.config, module.state_dict(), vocab_ids=module.vocab.ids, **options
    )


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
