"""Writing checkpoints tensor by tensor: shards, index and config appear together or not at all.

Everything is written to a folder beside the wanted one, which takes its name when all is done. The
header of a safetensors file comes before the data and names every tensor, so room for it is kept at
the front and filled in at the end; what it does not need is padded with spaces.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dspark.base_model.checkpoint import INDEX_NAME, Layout
from dspark.base_model.config import V4Config
from dspark.base_model.names import transformers_name
from dspark.base_model.random_weights import random_tensors
from dspark.base_model.shards import tag_of
from dspark.errors import CheckpointError

__all__ = [
    "CheckpointWriter",
    "default_config",
    "official_config",
    "random_checkpoint",
    "refuse_used",
    "save_checkpoint",
]

_SHARD_BYTES = 5_000_000_000
_HEADER_ROOM = 1 << 18  # bytes kept for a header; a full one ends the shard
_ENTRY_ROOM = 90  # bytes of a header entry beside the name: dtype, shape, offsets
_METADATA_ROOM = 40  # bytes of a header without entries
_ALIGNMENT = 8
_WRITE_LIMIT = 1 << 30  # Linux writes at most 2 GiB at a time


def official_config(config: V4Config, *, is_quantised: bool) -> dict[str, Any]:
    """The official config.json, with the block that says how weights are quantised."""
    raw = config.to_official()
    if is_quantised:
        raw["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        }
    return raw


def save_checkpoint(
    folder: Path | str,
    config: V4Config,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    layout: Layout = Layout.OFFICIAL,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write a checkpoint.

    Args:
        folder: Where to; must not exist, or be empty.
        config: Written as config.json in the dialect of `layout`.
        tensors: Official names and tensors, scales included; only one is held at a time.
        layout: How to name them.
        shard_bytes: Data bytes after which a new file begins.

    Raises:
        CheckpointError: If the folder is not empty, the disk is full, or a name comes twice.
    """
    with CheckpointWriter(folder, layout=layout, shard_bytes=shard_bytes) as writer:
        is_quantised = False
        for name, tensor in tensors:
            is_quantised = is_quantised or name.endswith(".scale")
            writer.add(name, tensor)
        writer.write_config(default_config(config, layout, is_quantised=is_quantised))


def random_checkpoint(
    folder: Path | str,
    config: V4Config,
    *,
    seed: int = 0,
    quantised: bool = True,
    layout: Layout = Layout.OFFICIAL,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write a checkpoint of random weights, one tensor at a time.

    Args:
        folder: Where to; must not exist, or be empty.
        config: Its shape; `expert_dtype` "fp8" gives FP8 experts with float32 scales (Base).
        seed: Equal seeds give equal files.
        quantised: As the release stores weights, or all in bfloat16.
        layout: How to name the tensors.
        shard_bytes: Data bytes after which a new file begins.

    Raises:
        CheckpointError: If the folder is not empty or the disk is full.
    """
    tensors = random_tensors(config, seed=seed, quantised=quantised)
    save_checkpoint(folder, config, tensors, layout=layout, shard_bytes=shard_bytes)


def default_config(config: V4Config, layout: Layout, *, is_quantised: bool) -> dict[str, Any]:
    """The config.json of a layout."""
    official = official_config(config, is_quantised=is_quantised)
    if layout is Layout.OFFICIAL:
        return official
    raw = config.to_transformers()
    if is_quantised:
        raw["quantization_config"] = official["quantization_config"]
    return raw


@dataclass(slots=True)
class _Shard:
    """A file that is being written."""

    path: Path
    fd: int
    size: int = 0  # data bytes, those put off included
    end: int = 0  # data bytes that have their place
    header_size: int = 0  # at most; of the entries so far
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    late: list[tuple[str, Tensor]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # once the header is written


class CheckpointWriter:
    """Writes a checkpoint under a temporary name; leaving the block without error publishes it.

    Args:
        folder: Where to; must not exist, or be empty.
        layout: How to name the tensors.
        shard_bytes: Data bytes after which a new file begins.

    Raises:
        CheckpointError: If the folder is not empty, or cannot be made.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        layout: Layout = Layout.OFFICIAL,
        shard_bytes: int = _SHARD_BYTES,
    ) -> None:
        self._folder = Path(folder)
        refuse_used(self._folder)
        self._layout = layout
        self._shard_bytes = shard_bytes
        self._shards: list[_Shard] = []
        self._names: set[str] = set()
        self.partial = self._folder.parent / f".{self._folder.name}.partial-{os.getpid()}"
        try:
            self.partial.mkdir(parents=True)
        except OSError as exc:
            raise self._failure(exc) from exc

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        except OSError as exc:
            raise self._failure(exc) from exc
        finally:
            for shard in self._shards:
                os.close(shard.fd)
            if self.partial.exists():  # it has not become the folder
                shutil.rmtree(self.partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._failure(error) from error

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor.

        Args:
            name: Official, of an expert's matrix or its scale, too.
            tensor: Any dtype that safetensors has.

        Raises:
            CheckpointError: If the name was written before, the dtype has no name in a header, or
                the disk is full.
        """
        if name in self._names:
            raise CheckpointError(f"{name} was to be written twice.")
        self._names.add(name)
        tag_of(tensor.dtype)
        tensor = tensor.detach().cpu().contiguous()
        if self._layout is Layout.TRANSFORMERS:
            name = transformers_name(name)
        shard = self._room(name, tensor.nbytes)
        if tensor.nbytes % _ALIGNMENT:
            # After an odd size, what follows would lie askew, and readers would have to copy it.
            shard.late.append((name, tensor.clone()))
        else:
            self._write(shard, name, tensor)

    def write_config(self, raw: dict[str, Any]) -> None:
        """Write config.json."""
        self.write_json("config.json", raw)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file beside the weights.

        Raises:
            CheckpointError: If the disk is full.
        """
        try:
            path = self.partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        except OSError as exc:
            raise self._failure(exc) from exc

    def copy_file(self, source: Path, name: str) -> None:
        """Copy a file (a tokenizer, say) into the checkpoint.

        Raises:
            CheckpointError: If it cannot be read or the disk is full.
        """
        try:
            path = self.partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
        except OSError as exc:
            raise self._failure(exc) from exc

    def _room(self, name: str, nbytes: int) -> _Shard:
        """The shard to write to: the last one, unless that is full."""
        entry = len(name) + _ENTRY_ROOM
        if self._shards:
            last = self._shards[-1]
            is_full = last.size + nbytes > self._shard_bytes and last.size > 0
            if not is_full and last.header_size + entry <= _HEADER_ROOM:
                last.header_size += entry
                last.size += nbytes
                return last
            self._seal(last)
        path = self.partial / f"{len(self._shards) + 1}.safetensors"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as exc:
            raise self._failure(exc) from exc
        self._shards.append(_Shard(path, fd, nbytes, header_size=_METADATA_ROOM + entry))
        return self._shards[-1]

    def _write(self, shard: _Shard, name: str, tensor: Tensor) -> None:
        shard.entries[name] = {
            "dtype": tag_of(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [shard.end, shard.end + tensor.nbytes],
        }
        data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
        offset = 8 + _HEADER_ROOM + shard.end
        shard.end += tensor.nbytes
        try:
            while data:
                done = os.pwrite(shard.fd, data[:_WRITE_LIMIT], offset)
                data, offset = data[done:], offset + done
        except OSError as exc:
            raise self._failure(exc) from exc

    def _seal(self, shard: _Shard) -> None:
        """Write what was put off and the header."""
        for name, tensor in sorted(shard.late, key=lambda item: -item[1].element_size()):
            self._write(shard, name, tensor)
        shard.late.clear()
        entries = {"__metadata__": {"format": "pt"}, **shard.entries}
        header = json.dumps(entries, separators=(",", ":")).encode().ljust(_HEADER_ROOM)
        try:
            os.pwrite(shard.fd, struct.pack("<Q", len(header)) + header, 0)
            os.fsync(shard.fd)
        except OSError as exc:
            raise self._failure(exc) from exc
        shard.names = list(shard.entries)
        shard.entries.clear()

    def _finish(self) -> None:
        """Write the index, name the shards, and publish the folder."""
        if self._shards:
            self._seal(self._shards[-1])
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
            shard.path.rename(self.partial / file)
            weight_map.update(dict.fromkeys(shard.names, file))
        total = sum(shard.size for shard in self._shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        self.write_json(INDEX_NAME, index)
        self.partial.rename(self._folder)

    def _failure(self, exc: OSError) -> CheckpointError:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return CheckpointError(
                f"{self._folder} cannot be written: no space left on the device.",
                hint="free some space, or choose a folder on another disk",
            )
        return CheckpointError(f"{self._folder} cannot be written: {exc.strerror}.")


def refuse_used(folder: Path) -> None:
    """Refuse to write where something is.

    Raises:
        CheckpointError: If the folder exists and is not empty, or is a file.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise CheckpointError(
            f"{folder} exists and is not an empty folder.", hint="choose a folder that is new"
        )
