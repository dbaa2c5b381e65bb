"""A folder with a DeepSeek-V4 checkpoint, read by official names whatever its layout.

Nothing is copied: tensors are views of the files. The stacked experts of the transformers layout
are views, too, since the matrices of an expert are neighbours in a stack.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark.base_model.config import V4Config
from dspark.base_model.names import (
    Storage,
    TensorSpec,
    expected_tensors,
    official_name,
    parse_stack,
    stage_count,
)
from dspark.base_model.shards import Piece, ShardMap, read_header
from dspark.base_model.stored import StoredWeight
from dspark.errors import CheckpointError, ConfigError

__all__ = ["INDEX_NAME", "Checkpoint", "Layout"]

INDEX_NAME = "model.safetensors.index.json"
_ROUTED = ".ffn.experts."  # in the names of what there are too many of to be mapped one by one
_SHOWN = 5  # problems that an error lists by name
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32)


class Layout(Enum):
    """How a checkpoint names its tensors."""

    OFFICIAL = "official"
    TRANSFORMERS = "transformers"


class Checkpoint:
    """An opened checkpoint.

    Attributes:
        folder: Where it is.
        raw_config: Its config.json as it is.
        config: The same, read; `draft_stages` counts the `mtp.*` blocks that are there.
        layout: How its files name the tensors.
    """

    def __init__(
        self, folder: Path, raw_config: dict[str, Any], pieces: dict[str, Piece], layout: Layout
    ) -> None:
        self.folder = folder
        self.raw_config = raw_config
        self.layout = layout
        self._pieces = pieces
        self._map = ShardMap()
        try:
            config = V4Config.from_dict(raw_config)
        except ConfigError as exc:
            raise CheckpointError(f"{folder / 'config.json'}: {exc.message}") from exc
        self.config = replace(config, draft_stages=stage_count(list(pieces)))

    @staticmethod
    def open(folder: Path | str) -> Checkpoint:
        """Read config and headers; no weights yet.

        Args:
            folder: Holds config.json and *.safetensors, with an index.json if they are several.

        Raises:
            CheckpointError: If a file is missing, cut short or contradicts another, or the config
                cannot be used.
        """
        folder = Path(folder)
        raw_config = _read_json(folder / "config.json")
        found = _read_files(folder)
        pieces: dict[str, Piece] = {}
        for name, piece in found.items():
            for official, part in _official_pieces(name, piece).items():
                if official in pieces:
                    raise CheckpointError(f"{piece.path} holds {official} under two names.")
                pieces[official] = part
        is_official = not any(name.startswith(("model.", "lm_head.")) for name in found)
        layout = Layout.OFFICIAL if is_official else Layout.TRANSFORMERS
        return Checkpoint(folder, raw_config, pieces, layout)

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def names(self) -> list[str]:
        """Official names of all tensors, scales included."""
        return list(self._pieces)

    def piece(self, name: str) -> Piece:
        """Where a tensor is, by official name.

        Raises:
            CheckpointError: If it is not there.
        """
        if name not in self._pieces:
            raise CheckpointError(f"{self.folder} holds no tensor {name}.")
        return self._pieces[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor as stored, by official name; a view of the file.

        Raises:
            CheckpointError: If it is not there.
        """
        return self._map.tensor(self.piece(name), with_file=_ROUTED in name)

    def stored(self, name: str) -> StoredWeight:
        """A weight and its scales, if it has any, as views of the files.

        Args:
            name: Without suffix, such as "layers.0.attn.wq_a".

        Raises:
            CheckpointError: If it is not there, or the scales do not fit the weight.
        """
        weight = self.tensor(f"{name}.weight")
        scale = self.tensor(f"{name}.scale") if f"{name}.scale" in self else None
        place = f"{self.piece(f'{name}.weight').path}: {name}.weight"
        return StoredWeight.of(place, weight, scale)

    def nbytes(self, prefix: str = "") -> int:
        """Bytes of all tensors whose official name begins with `prefix`."""
        return sum(p.nbytes for name, p in self._pieces.items() if name.startswith(prefix))

    def check(self) -> None:
        """Compare all tensors with what the config calls for.

        Raises:
            CheckpointError: If tensors are missing, not known, or of a wrong shape or dtype; it
                lists the first five and says how many there are.
        """
        expected = expected_tensors(self.config)
        problems = [f"{name} is missing" for name in expected if name not in self]
        problems += self._stage_problems()
        for name in self._pieces:
            weight = name.removesuffix(".scale") + ".weight" if name.endswith(".scale") else name
            if weight not in expected:
                problems.append(f"{name} in {self._pieces[name].path.name} is not known")
            elif weight != name and weight not in self:
                problems.append(f"{name} has no weight")
        for name, spec in expected.items():
            problem = self._problem(name, spec) if name in self else None
            if problem:
                problems.append(f"{name} in {self._pieces[name].path.name} {problem}")
        if problems:
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise CheckpointError(
                f"{self.folder} does not fit its config.json, {len(problems)} "
                f"problem{'s' if len(problems) > 1 else ''}: {'; '.join(problems[:_SHOWN])}{more}."
            )

    def _problem(self, name: str, spec: TensorSpec) -> str | None:
        """What is wrong with a tensor, as the rest of a sentence."""
        piece = self._pieces[name]
        if spec.storage is Storage.I64:
            is_right, wanted = piece.dtype in _INTEGERS, "an integer"
        elif spec.storage in (Storage.BF16, Storage.F32):
            is_right, wanted = piece.dtype in _FLOATS, "a float"
        else:
            return self._weight_problem(name, spec)
        if not is_right:
            return f"is stored as {_name(piece.dtype)}, but must be {wanted}"
        if f"{name.removesuffix('.weight')}.scale" in self and name.endswith(".weight"):
            return "has a scale, but is not a quantised weight"
        if piece.shape != spec.shape:
            return f"has shape {list(piece.shape)}, but needs {list(spec.shape)}"
        return None

    def _weight_problem(self, name: str, spec: TensorSpec) -> str | None:
        base = name.removesuffix(".weight")
        weight = self._pieces[name]
        scale = self._pieces.get(f"{base}.scale")
        try:
            stored = StoredWeight.of("", _meta(weight), None if scale is None else _meta(scale))
        except CheckpointError as exc:
            return exc.message.strip().removesuffix(".")
        if stored.shape != spec.shape:
            return f"has shape {list(stored.shape)}, but needs {list(spec.shape)}"
        return None

    def _stage_problems(self) -> list[str]:
        """The official code reads the number of stages from a file of its own."""
        path = self.folder / "inference" / "config.json"
        declared = _read_json(path).get("n_mtp_layers") if path.exists() else None
        have = self.config.draft_stages
        if declared is None or have in (0, declared):
            return []
        return [f"inference/config.json names {declared} draft stages, but {have} are there"]


def _official_pieces(name: str, piece: Piece) -> dict[str, Piece]:
    """The official tensors that a tensor in a file holds: several if it stacks experts."""
    stack = parse_stack(name)
    if stack is None:
        return {official_name(name): piece}
    if len(piece.shape) != 3 or piece.shape[1] % len(stack.matrices):
        raise CheckpointError(
            f"{piece.path}: {name} has shape {list(piece.shape)}, but must be "
            f"[experts, {'2 x ' if len(stack.matrices) == 2 else ''}rows, columns]."
        )
    rows = piece.shape[1] // len(stack.matrices)
    return {
        f"{stack.experts}.{expert}.{matrix}{stack.suffix}": piece.rows(expert, i * rows, rows)
        for expert in range(piece.shape[0])
        for i, matrix in enumerate(stack.matrices)
    }


def _read_files(folder: Path) -> dict[str, Piece]:
    """All tensors of a folder by their names in the files."""
    index = folder / INDEX_NAME
    if index.exists():
        return _read_indexed(folder, _read_json(index).get("weight_map"))
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder} holds no .safetensors file.")
    pieces: dict[str, Piece] = {}
    for path in paths:
        for name, piece in read_header(path).items():
            if name in pieces:
                raise CheckpointError(f"{name} is in both {pieces[name].path} and {path}.")
            pieces[name] = piece
    return pieces


def _read_indexed(folder: Path, weight_map: object) -> dict[str, Piece]:
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map.")
    headers: dict[str, dict[str, Piece]] = {}
    pieces: dict[str, Piece] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise CheckpointError(
                f"{folder / INDEX_NAME}: {name} is in {file!r}, which no shard is."
            )
        if file not in headers:
            if not (folder / file).exists():
                raise CheckpointError(
                    f"{folder / file} is missing, which should hold {name}.",
                    hint="download or copy the file again",
                )
            headers[file] = read_header(folder / file)
        if name not in headers[file]:
            raise CheckpointError(f"{folder / file} does not hold {name}, but the index says so.")
        pieces[name] = headers[file][name]
    return pieces


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror}.") from exc
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as exc:
        raise CheckpointError(f"{path} is not JSON.") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return value


def _meta(piece: Piece) -> Tensor:
    return torch.empty(piece.shape, dtype=piece.dtype, device="meta")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
