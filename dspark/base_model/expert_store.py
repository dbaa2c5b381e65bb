"""Where routed experts come from: the mapped checkpoint, a dict, or a budget of memory.

A token uses a few experts of a layer, so a model larger than memory runs by reading the experts it
needs and keeping those used last. `PagedExperts` reads into memory of its own instead of mapping
files: what the system keeps of a mapped file does not heed a limit, and evicting it is its choice.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dspark.base_model.checkpoint import Checkpoint
from dspark.base_model.shards import Piece
from dspark.base_model.stored import StoredWeight
from dspark.errors import CapabilityError, CheckpointError, ConfigError

__all__ = [
    "DictExperts",
    "ExpertStore",
    "ExpertWeights",
    "PagedExperts",
    "PagingStats",
    "ResidentExperts",
]

_MATRICES = ("w1", "w2", "w3")
_ALIGNMENT = 64  # bytes; a tensor's place in an expert's buffer
_READ_LIMIT = 1 << 30  # Linux reads at most 2 GiB at a time


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """A SwiGLU expert: w2(silu(w1 x) * (w3 x)).

    Attributes:
        w1: Gate, [moe_intermediate_size, D].
        w2: Down, [D, moe_intermediate_size].
        w3: Up, [moe_intermediate_size, D].
    """

    w1: StoredWeight
    w2: StoredWeight
    w3: StoredWeight

    @property
    def nbytes(self) -> int:
        """Bytes of the three matrices and their scales."""
        return self.w1.nbytes + self.w2.nbytes + self.w3.nbytes


class ExpertStore(Protocol):
    """Gives the routed experts of a layer."""

    def fetch(self, prefix: str, expert: int) -> ExpertWeights:
        """The weights of an expert.

        Args:
            prefix: Official, such as "layers.3.ffn.experts" or "mtp.0.ffn.experts".
            expert: Its number.

        Raises:
            CheckpointError: If there is no such expert.
        """
        ...


class ResidentExperts:
    """Experts as views of a mapped checkpoint: what is used stays in memory while there is room."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def fetch(self, prefix: str, expert: int) -> ExpertWeights:
        """See `ExpertStore`."""
        w1, w2, w3 = (self._checkpoint.stored(f"{prefix}.{expert}.{m}") for m in _MATRICES)
        return ExpertWeights(w1, w2, w3)


class DictExperts:
    """Experts among tensors in a dict.

    Args:
        tensors: Official names and tensors, scales included.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def fetch(self, prefix: str, expert: int) -> ExpertWeights:
        """See `ExpertStore`."""
        w1, w2, w3 = (self._stored(f"{prefix}.{expert}.{m}") for m in _MATRICES)
        return ExpertWeights(w1, w2, w3)

    def _stored(self, name: str) -> StoredWeight:
        weight = self._tensors.get(f"{name}.weight")
        if weight is None:
            raise CheckpointError(f"there is no tensor {name}.weight.")
        return StoredWeight.of(name, weight, self._tensors.get(f"{name}.scale"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PagingStats:
    """What a paged store has done.

    Attributes:
        hits: Fetches answered from memory.
        misses: Fetches that read a file.
        evictions: Experts dropped for others.
        bytes_read: From files.
        seconds_reading: In reads.
        bytes_held: In memory now.
    """

    hits: int
    misses: int
    evictions: int
    bytes_read: int
    seconds_reading: float
    bytes_held: int


class PagedExperts:
    """Experts read from the files on demand; those used last are kept within a budget.

    Thread-safe. A fetch evicts before it reads, so what the store itself holds never exceeds the
    budget; weights that a caller still holds after their eviction live until it lets go of them.

    Args:
        checkpoint: Where they are; either layout.
        budget_bytes: Bytes to hold at most.

    Raises:
        ConfigError: If the budget is under the experts that one token needs in one layer.
        CheckpointError: If the checkpoint has no routed experts, or one lacks a matrix.
    """

    def __init__(self, checkpoint: Checkpoint, budget_bytes: int) -> None:
        self._plans = _plans(checkpoint)
        largest = max(plan.nbytes for plan in self._plans.values())
        chosen = checkpoint.config.num_experts_per_tok
        self.least_bytes = largest * chosen
        if budget_bytes < self.least_bytes:
            raise ConfigError(
                f"the expert budget is {budget_bytes} bytes, but must be at least "
                f"{self.least_bytes}: a token uses {chosen} experts of a layer, of up to {largest} "
                f"bytes each."
            )
        self.budget_bytes = budget_bytes
        self._held: OrderedDict[tuple[str, int], ExpertWeights] = OrderedDict()
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._bytes_held = 0
        self._hits = self._misses = self._evictions = self._bytes_read = 0
        self._seconds = 0.0

    def fetch(self, prefix: str, expert: int) -> ExpertWeights:
        """See `ExpertStore`.

        Raises:
            CheckpointError: If there is no such expert, or its file cannot be read.
        """
        with self._lock:
            return self._fetch((prefix, expert))

    @property
    def stats(self) -> PagingStats:
        """Counts since the store was made."""
        with self._lock:
            return PagingStats(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                bytes_read=self._bytes_read,
                seconds_reading=self._seconds,
                bytes_held=self._bytes_held,
            )

    def close(self) -> None:
        """Drop all weights and close the files; a later fetch opens them again."""
        with self._lock:
            self._held.clear()
            self._bytes_held = 0
            for fd in self._files.values():
                os.close(fd)
            self._files.clear()

    def _plan(self, key: tuple[str, int]) -> _Plan:
        if key not in self._plans:
            raise CheckpointError(f"there is no expert {key[1]} of {key[0]} in the checkpoint.")
        return self._plans[key]

    def _fetch(self, key: tuple[str, int]) -> ExpertWeights:
        plan = self._plan(key)
        weights = self._held.get(key)
        if weights is not None:
            self._hits += 1
            self._held.move_to_end(key)
            return weights
        self._misses += 1
        while self._bytes_held + plan.nbytes > self.budget_bytes:
            gone, _ = self._held.popitem(last=False)
            self._bytes_held -= self._plans[gone].nbytes
            self._evictions += 1
        weights = self._read(plan)
        self._held[key] = weights
        self._bytes_held += plan.nbytes
        return weights

    def _read(self, plan: _Plan) -> ExpertWeights:
        begin = time.perf_counter()
        try:
            buffer = torch.empty(plan.nbytes, dtype=torch.uint8)
        except (RuntimeError, MemoryError) as exc:  # how torch says that memory is out
            raise CapabilityError(
                f"there is no memory for one more expert of {plan.nbytes} bytes, with "
                f"{self._bytes_held} bytes of experts held.",
                hint="lower --expert-memory",
            ) from exc
        tensors: dict[str, Tensor] = {}
        for name, piece, offset in plan.pieces:
            part = buffer[offset : offset + piece.nbytes]
            self._read_piece(piece, part)
            tensors[name] = part.view(piece.dtype).view(piece.shape)
            self._bytes_read += piece.nbytes
        self._seconds += time.perf_counter() - begin
        w1, w2, w3 = (
            StoredWeight.of(m, tensors[f"{m}.weight"], tensors.get(f"{m}.scale")) for m in _MATRICES
        )
        return ExpertWeights(w1, w2, w3)

    def _read_piece(self, piece: Piece, part: Tensor) -> None:
        rest: memoryview = part.numpy().data
        offset = piece.start
        try:
            if piece.path not in self._files:
                self._files[piece.path] = os.open(piece.path, os.O_RDONLY)
            while rest:
                done = os.preadv(self._files[piece.path], [rest[:_READ_LIMIT]], offset)
                if not done:
                    raise CheckpointError(f"{piece.path} has become shorter than it was.")
                rest, offset = rest[done:], offset + done
        except OSError as exc:
            raise CheckpointError(f"{piece.path} cannot be read: {exc.strerror}.") from exc


@dataclass(frozen=True, slots=True)
class _Plan:
    """How to read an expert: its tensors in the order of the file, and where each goes."""

    pieces: tuple[tuple[str, Piece, int], ...]
    nbytes: int

    @property
    def place(self) -> tuple[str, int]:
        """What plans are sorted by to read files forwards."""
        return str(self.pieces[0][1].path), self.pieces[0][1].start


_EXPERT = re.compile(r"(.+\.ffn\.experts)\.(\d+)\.(w[123]\.(?:weight|scale))")


def _plans(checkpoint: Checkpoint) -> dict[tuple[str, int], _Plan]:
    found: dict[tuple[str, int], dict[str, Piece]] = {}
    for name in checkpoint.names():
        match = _EXPERT.fullmatch(name)
        if match:
            key = (match[1], int(match[2]))
            found.setdefault(key, {})[match[3]] = checkpoint.piece(name)
    if not found:
        raise CheckpointError(f"{checkpoint.folder} holds no routed experts.")
    return {key: _plan(key, pieces) for key, pieces in found.items()}


def _plan(key: tuple[str, int], pieces: dict[str, Piece]) -> _Plan:
    for matrix in _MATRICES:
        name = f"{key[0]}.{key[1]}.{matrix}"
        weight, scale = pieces.get(f"{matrix}.weight"), pieces.get(f"{matrix}.scale")
        if weight is None:
            raise CheckpointError(f"the checkpoint holds no tensor {name}.weight.")
        # A checkpoint that cannot be used is refused now, not in the middle of a text.
        StoredWeight.of(name, _meta(weight), None if scale is None else _meta(scale))
    placed, size = [], 0
    for name, piece in sorted(pieces.items(), key=lambda item: (item[1].path, item[1].start)):
        placed.append((name, piece, size))
        size += -(-piece.nbytes // _ALIGNMENT) * _ALIGNMENT
    return _Plan(tuple(placed), size)


def _meta(piece: Piece) -> Tensor:
    return torch.empty(piece.shape, dtype=piece.dtype, device="meta")
