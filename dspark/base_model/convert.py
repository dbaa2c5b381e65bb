"""Conversion of checkpoints between layouts and weight formats, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark.base_model.checkpoint import Checkpoint, Layout
from dspark.base_model.checkpoint_write import CheckpointWriter, default_config, refuse_used
from dspark.base_model.config import V4Config
from dspark.base_model.fp4 import quantise_fp4, recast_fp4_to_fp8
from dspark.base_model.fp8 import decode_e8m0, quantise_fp8
from dspark.base_model.names import Storage, TensorSpec, expected_tensors
from dspark.base_model.stored import StoredWeight
from dspark.errors import CheckpointError, ConfigError, ShapeError

__all__ = ["ConversionResult", "WeightFormat", "convert_checkpoint"]

_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "encoding/**/*",
)
_INFERENCE = "inference/config.json"  # the official code's own config


class WeightFormat(Enum):
    """What the weight matrices of the new checkpoint are stored in."""

    KEEP = "keep"
    """What they were."""
    FP4 = "fp4"
    """As in the releases: FP4 routed experts, other linears FP8."""
    FP8 = "fp8"
    """As in the Base releases: all of them FP8, the scales of experts float32."""
    BF16 = "bf16"
    FLOAT32 = "float32"


_DTYPES = {WeightFormat.BF16: torch.bfloat16, WeightFormat.FLOAT32: torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionResult:
    """What a conversion wrote.

    Attributes:
        folder: Where to.
        tensors: Tensors written, scales included.
        nbytes: Their bytes.
        files: Other files that were copied, by their paths in the folder.
    """

    folder: Path
    tensors: int
    nbytes: int
    files: tuple[str, ...]


def convert_checkpoint(
    source: Path | str,
    dest: Path | str,
    *,
    layout: Layout,
    weights: WeightFormat = WeightFormat.KEEP,
    shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionResult:
    """Write a checkpoint in another layout or weight format.

    Args:
        source: A checkpoint in either layout.
        dest: Where to; must not exist, or be empty. It appears when all is written.
        layout: How to name the tensors.
        weights: What to store the weight matrices in.
        shard_bytes: Data bytes after which a new file begins.
        progress: Called with the source's bytes done and to do after every tensor.

    Raises:
        CheckpointError: If the source cannot be used or does not fit its config, a weight cannot
            be held by the format, `dest` is not empty, or the disk is full.
        ConfigError: If the config cannot be written in the layout's dialect.
    """
    dest = Path(dest)
    refuse_used(dest)
    checkpoint = Checkpoint.open(source)
    checkpoint.check()
    config = replace(checkpoint.config, expert_dtype=_expert_dtype(checkpoint, weights))
    _check_dialect(config, layout)
    count = size = done = 0
    total = checkpoint.nbytes()
    is_quantised = False
    with CheckpointWriter(dest, layout=layout, shard_bytes=shard_bytes) as writer:
        for name, spec in expected_tensors(config).items():
            for out_name, tensor in _converted(checkpoint, name, spec, weights):
                writer.add(out_name, tensor)
                count, size = count + 1, size + tensor.nbytes
                is_quantised = is_quantised or out_name.endswith(".scale")
            done += sum(checkpoint.piece(n).nbytes for n in _sources(checkpoint, name))
            if progress is not None:
                progress(done, total)
        raw = default_config(config, layout, is_quantised=is_quantised)
        writer.write_config(_with_extras(checkpoint, raw, layout))
        files = _copy_files(checkpoint, config, writer)
    return ConversionResult(folder=dest, tensors=count, nbytes=size, files=files)


def _sources(checkpoint: Checkpoint, name: str) -> list[str]:
    """A tensor and its scale, if it has one."""
    scale = name.removesuffix(".weight") + ".scale"
    return [name, scale] if name.endswith(".weight") and scale in checkpoint else [name]


def _converted(
    checkpoint: Checkpoint, name: str, spec: TensorSpec, weights: WeightFormat
) -> Iterator[tuple[str, Tensor]]:
    """What is to be written for an expected tensor: itself, and its scale."""
    if spec.storage not in (Storage.FP8, Storage.EXPERT):
        yield name, _plain(checkpoint.tensor(name), spec.storage, weights)
        return
    base = name.removesuffix(".weight")
    try:
        stored = _recoded(checkpoint.stored(base), spec.storage, weights)
    except (CheckpointError, ShapeError) as exc:
        raise CheckpointError(f"{name} cannot be converted: {exc.message}") from exc
    yield name, stored.weight
    if stored.scale is not None:
        yield f"{base}.scale", stored.scale


def _plain(tensor: Tensor, storage: Storage, weights: WeightFormat) -> Tensor:
    """A tensor that is never quantised, in the dtype that goes with the weights."""
    if weights is WeightFormat.KEEP:
        return tensor
    if storage is Storage.I64:
        return tensor.to(torch.int64)
    is_wide = storage is Storage.F32 or weights is WeightFormat.FLOAT32
    return tensor.to(torch.float32 if is_wide else torch.bfloat16)


def _recoded(stored: StoredWeight, storage: Storage, weights: WeightFormat) -> StoredWeight:
    if weights is WeightFormat.KEEP:
        return stored
    if weights in _DTYPES:
        return StoredWeight(stored.dequantise(_DTYPES[weights]))
    is_expert = storage is Storage.EXPERT
    wanted = "fp4" if is_expert and weights is WeightFormat.FP4 else "fp8"
    if stored.kind == wanted:
        return stored
    if wanted == "fp4":
        return StoredWeight(*quantise_fp4(stored.dequantise(torch.float32)))
    if stored.kind == "fp4" and stored.scale is not None:
        weight, scale = recast_fp4_to_fp8(stored.weight, stored.scale)
    else:
        weight, scale = quantise_fp8(stored.dequantise(torch.float32))
    return StoredWeight(weight, decode_e8m0(scale) if is_expert else scale)


def _expert_dtype(checkpoint: Checkpoint, weights: WeightFormat) -> str:
    """What the new config says of the experts: what they are in, whatever the old one said."""
    if weights in (WeightFormat.FP4, WeightFormat.FP8):
        return str(weights.value)
    first = next(
        name
        for name, spec in expected_tensors(checkpoint.config).items()
        if spec.storage is Storage.EXPERT
    )
    kind = checkpoint.stored(first.removesuffix(".weight")).kind
    return kind if kind != "float" else checkpoint.config.expert_dtype


def _check_dialect(config: V4Config, layout: Layout) -> None:
    if layout is Layout.OFFICIAL:
        return
    bare = replace(config, draft_stages=0)
    if replace(V4Config.from_dict(config.to_transformers()), draft_stages=0) != bare:
        raise ConfigError(
            f"compress_ratios {list(config.compress_ratios)} cannot be written for transformers, "
            f"which knows one rate beside 0 and 4."
        )


def _with_extras(checkpoint: Checkpoint, raw: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Keep the fields of the old config that we do not know, if it was of the same dialect."""
    if layout is not checkpoint.layout:
        return raw
    extras = {k: v for k, v in checkpoint.raw_config.items() if k != "quantization_config"}
    return {**extras, **raw}


def _copy_files(
    checkpoint: Checkpoint, config: V4Config, writer: CheckpointWriter
) -> tuple[str, ...]:
    """Copy the tokenizer and what else goes with a model, but no code that loads weights."""
    copied: list[str] = []
    for pattern in _COPIED:
        for path in sorted(checkpoint.folder.glob(pattern)):
            name = path.relative_to(checkpoint.folder).as_posix()
            if path.is_file() and "__pycache__" not in name and name not in copied:
                writer.copy_file(path, name)
                copied.append(name)
    inference = checkpoint.folder / _INFERENCE
    if inference.is_file():
        try:
            raw = json.loads(inference.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as exc:
            raise CheckpointError(f"{inference} is not JSON.") from exc
        writer.write_json(_INFERENCE, {**raw, "expert_dtype": config.expert_dtype})
        copied.append(_INFERENCE)
    return tuple(copied)
