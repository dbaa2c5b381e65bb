"""Target features on disk, so that only the first epoch runs the target.

    CACHE/<key>/about.json          what the key stands for
    CACHE/<key>/part-00000-<name>.safetensors, ...

A part holds the features of some samples: `<sample>/hidden` and `/final` in bfloat16, `/total` in
float32 and `/best` in int32, where a sample is named by a checksum of its tokens. The key is one of
the target and its weights, the captured layers and the temperature. So other runs with the same
ones use the features too, also where data came or went. Parts are read by memory map.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspark.errors import CheckpointError
from dspark.training.features import Features
from dspark.training.world import ALONE, World

__all__ = ["STORED", "FeatureCache", "weights_checksum"]

STORED = torch.bfloat16
"""What hidden states are kept in."""

_PART_BYTES = 256 << 20
_NAMES = ("hidden", "final", "total", "best")
_SLICES = 64
_SLICE_BYTES = 64 << 10


def weights_checksum(folder: Path) -> str:
    """Checksum of slices spread over a model's weight files.

    Names, sizes and beginnings of files, which identify a model elsewhere, may be those of another
    one that was fine-tuned in its last layers alone. Features are kept for long and are many, so
    this looks further; files of up to 4 MiB are read whole.

    Args:
        folder: Of the model.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        room = max(0, size - _SLICE_BYTES)
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            for start in dict.fromkeys(room * i // (_SLICES - 1) for i in range(_SLICES)):
                file.seek(start)
                digest.update(file.read(_SLICE_BYTES))
    return digest.hexdigest()


class FeatureCache:
    """Features by the samples' keys.

    Args:
        folder: The cache folder.
        about: What the features depend on, as JSON values.
        world: The processes of the run; each writes parts of its own, and reads all.
    """

    def __init__(
        self, folder: str | Path, about: Mapping[str, Any], *, world: World = ALONE
    ) -> None:
        text = json.dumps(about, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        self.folder = Path(folder) / key
        self.folder.mkdir(parents=True, exist_ok=True)
        self._world = world
        self._open: dict[Path, Any] = {}
        self._place: dict[str, Path] = {}
        self._waiting: dict[str, Features] = {}
        self._waiting_bytes = 0
        note = self.folder / "about.json"
        if not note.exists():
            note.write_text(json.dumps(about, indent=1), encoding="utf-8")
        self._look()

    def _look(self) -> None:
        """Take in parts that were not there before."""
        for path in sorted(self.folder.glob("part-*.safetensors")):
            if path not in self._open:
                self._index(path)

    def __len__(self) -> int:
        return len(self._place) + len(self._waiting)

    def _index(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
            names = [str(name) for name in file.keys()]  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as exc:
            raise CheckpointError(
                f"{path} cannot be read: {exc}.", hint="delete it; it is computed again"
            ) from exc
        self._open[path] = file
        for name in names:
            self._place[name.partition("/")[0]] = path

    def get(self, key: str) -> Features | None:
        """Features of a sample, None if they are not there."""
        if key in self._waiting:
            return self._waiting[key]
        if key not in self._place and self._world.size > 1:
            self._look()  # another process may have it; alone, others' parts are not waited for
        path = self._place.get(key)
        if path is None:
            return None
        file = self._open[path]
        tensors = {name: file.get_tensor(f"{key}/{name}") for name in _NAMES}
        return Features(**{**tensors, "best": tensors["best"].to(torch.int64)})

    def put(self, key: str, features: Features) -> None:
        """Keep the features of a sample; they are on disk after the next `flush`."""
        if key in self._waiting or key in self._place:
            return
        self._waiting[key] = features
        parts = (features.hidden, features.final)
        self._waiting_bytes += sum(tensor.numel() * tensor.element_size() for tensor in parts)
        if self._waiting_bytes >= _PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if not self._waiting:
            return
        tensors: dict[str, Tensor] = {}
        for key, own in self._waiting.items():
            tensors[f"{key}/hidden"] = own.hidden.to(STORED).contiguous()
            tensors[f"{key}/final"] = own.final.to(STORED).contiguous()
            tensors[f"{key}/total"] = own.total.float().contiguous()
            tensors[f"{key}/best"] = own.best.to(torch.int32).contiguous()
        number = len(list(self.folder.glob("part-*.safetensors")))
        # A name that no other run over the same features can choose at the same time.
        unique = f"{self._world.rank}-{uuid.uuid4().hex[:8]}"
        path = self.folder / f"part-{number:05d}-{unique}.safetensors"
        part = path.with_suffix(".writing")
        save_file(tensors, part)
        os.replace(part, path)
        self._index(path)
        self._waiting.clear()
        self._waiting_bytes = 0
