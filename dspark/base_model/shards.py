"""Safetensors files: their headers checked, their tensors mapped into memory without a copy.

A file is the length of the header (8 bytes, little endian), the header (JSON: name to dtype, shape
and offsets), and the data. We read the header ourselves since errors should name file and tensor,
and since paging needs the offsets.

Source: the safetensors format description, github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dspark.errors import CheckpointError

__all__ = ["DTYPES", "Piece", "ShardMap", "read_header", "tag_of"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""The dtypes of safetensors that we know, by their tags in headers."""
_HEADER_LIMIT = 100_000_000  # bytes; what safetensors itself refuses to exceed


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor's place in a file.

    Attributes:
        path: The file.
        dtype: Of the numbers as stored.
        shape: As stored: FP4 is int8 of half the columns.
        start: Its first byte, from the beginning of the file.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, index: int, first: int, count: int) -> Piece:
        """Rows first to first + count - 1 of matrix `index` of a stack [E, R, C]."""
        _, rows, columns = self.shape
        skipped = (index * rows + first) * columns * self.dtype.itemsize
        return replace(self, shape=(count, columns), start=self.start + skipped)


def tag_of(dtype: torch.dtype) -> str:
    """The header's tag of a dtype.

    Raises:
        CheckpointError: If safetensors files of ours cannot hold it.
    """
    for tag, known in DTYPES.items():
        if dtype == known:
            return tag
    raise CheckpointError(f"a tensor of {dtype} cannot be written; known: {', '.join(DTYPES)}.")


def read_header(path: Path) -> dict[str, Piece]:
    """Read what is in a file, and where.

    Raises:
        CheckpointError: If the file cannot be read, is cut short, or contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = _header_bytes(path, file.read(8), size, file.read)
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror}.") from exc
    try:
        header = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as exc:
        raise CheckpointError(f"{path} has a header that is not JSON.") from exc
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is not a JSON object.")
    data = 8 + len(raw)
    pieces = {
        name: _piece(path, name, value, data)
        for name, value in header.items()
        if name != "__metadata__"
    }
    _check_places(path, pieces, data, size)
    return pieces


def _header_bytes(path: Path, prefix: bytes, size: int, read: Any) -> bytes:
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
        raise CheckpointError(
            f"{path} is cut short or no safetensors file: it has {size} bytes and promises a "
            f"header of {length}.",
            hint="download or copy the file again",
        )
    raw: bytes = read(length)
    return raw


def _piece(path: Path, name: str, value: Any, data: int) -> Piece:
    try:
        tag, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(f"{path}: {name} lacks dtype, shape or data_offsets.") from exc
    numbers = [start, stop, *shape] if isinstance(shape, list) else [None]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise CheckpointError(f"{path}: {name} has a shape or offsets that are no sizes.")
    if tag not in DTYPES:
        raise CheckpointError(f"{path}: {name} is of dtype {tag!r}; known: {', '.join(DTYPES)}.")
    piece = Piece(path, DTYPES[tag], tuple(shape), data + start)
    if piece.nbytes != stop - start:
        raise CheckpointError(
            f"{path}: {name} of shape {shape} and dtype {tag} takes {piece.nbytes} bytes, but its "
            f"offsets span {stop - start}."
        )
    return piece


def _check_places(path: Path, pieces: dict[str, Piece], data: int, size: int) -> None:
    end, before = data, ""
    for name, piece in sorted(pieces.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if piece.start < end:
            raise CheckpointError(f"{path}: {name} overlaps {before}.")
        end, before = piece.start + piece.nbytes, name
        if end > size:
            raise CheckpointError(
                f"{path} is cut short: {name} ends at byte {end}, but the file has {size} bytes.",
                hint="download or copy the file again",
            )


class ShardMap:
    """Files mapped into memory, piece by piece or whole, each when it is first asked for.

    The mapping is private: writing to a tensor changes neither the file nor crashes. A private
    writable mapping counts in full where memory is limited (RLIMIT_DATA, strict overcommit), so
    what is asked for by itself is mapped by itself. There can be some 65,000 mappings in a process
    on Linux, more than a release has tensors but for its routed experts: their files are mapped
    whole.
    """

    def __init__(self) -> None:
        self._files: dict[Path, torch.UntypedStorage] = {}
        self._pieces: dict[Piece, Tensor] = {}

    def tensor(self, piece: Piece, *, with_file: bool = False) -> Tensor:
        """A tensor over the file's own pages; a copy only if it is not aligned to its dtype.

        Args:
            piece: The tensor's place.
            with_file: Map the whole file, once for all such tensors of it.

        Raises:
            CheckpointError: If the file cannot be mapped any more.
        """
        if not piece.nbytes:
            return torch.empty(piece.shape, dtype=piece.dtype)
        raw = self._of_file(piece) if with_file else self._alone(piece)
        if piece.start % piece.dtype.itemsize:
            raw = raw.clone()
        return raw.view(piece.dtype).view(piece.shape)

    def _alone(self, piece: Piece) -> Tensor:
        found = self._pieces.get(piece)
        if found is None:
            first = piece.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            size = piece.start - first + piece.nbytes
            try:
                with piece.path.open("rb") as file:
                    pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=first)
            except (OSError, ValueError) as exc:
                raise CheckpointError(f"{piece.path} cannot be mapped into memory: {exc}.") from exc
            found = torch.frombuffer(pages, dtype=torch.uint8)[piece.start - first :]
            self._pieces[piece] = found
        return found

    def _of_file(self, piece: Piece) -> Tensor:
        storage = self._files.get(piece.path)
        if storage is None:
            storage = self._files[piece.path] = self._map(piece.path)
        raw = torch.empty(0, dtype=torch.uint8)
        raw.set_(storage, piece.start, (piece.nbytes,), (1,))
        return raw

    @staticmethod
    def _map(path: Path) -> torch.UntypedStorage:
        try:
            storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        except (OSError, RuntimeError) as exc:
            raise CheckpointError(f"{path} cannot be mapped into memory: {exc}.") from exc
        return cast("torch.UntypedStorage", storage)
