"""A reader of GGUF files that is quick on large vocabularies and trusts no length in the file.

`gguf.GGUFReader` makes numpy views of every string (26 s for a vocabulary of 262 144); this one
walks the header once (under a second) and leaves dequantisation to `gguf.quants`.

Source: GGUF specification, version 3, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark.errors import CapabilityError, CheckpointError

__all__ = ["GGUFFile", "GGUFTensor", "read_gguf"]

_SCALARS = "BbHhIifBssQqd"  # struct codes by value type; 8 (string) and 9 (array) are not scalars
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MOST_DIMS = 4


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies.

    Attributes:
        name: Its GGUF name.
        shape: Row-major, so the reverse of the file's order.
        type_id: ggml type.
        start: First byte in the file.
        stop: One past the last byte.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    start: int
    stop: int


@dataclass(slots=True)
class GGUFFile:
    """The header of a GGUF file, and access to its tensors.

    Attributes:
        path: The file.
        metadata: Its key-value pairs; arrays of numbers are numpy arrays.
        tensors: Its tensors by name.
    """

    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, GGUFTensor] = field(default_factory=dict)

    def load(self, name: str) -> NDArray[np.float32]:
        """Read one tensor.

        Args:
            name: GGUF name.

        Returns:
            float32, dequantised, row-major.
        """
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        kind = GGMLQuantizationType(tensor.type_id)
        count = tensor.stop - tensor.start
        raw = np.fromfile(self.path, dtype=np.uint8, count=count, offset=tensor.start)
        rows = math.prod(tensor.shape[:-1])
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        if kind in plain:
            values = raw.view(plain[kind]).astype(np.float32)
        else:
            values = dequantize(raw.reshape(rows, -1), kind)
        return np.ascontiguousarray(values.reshape(tensor.shape), dtype=np.float32)


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file and check that its tensors lie inside it.

    Args:
        path: The file.

    Returns:
        Metadata and tensors.

    Raises:
        CheckpointError: If the file is not GGUF, is cut short or contradicts itself.
        CapabilityError: If it is of another version or uses an unknown tensor type.
    """
    try:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as m:
            return _Walker(path, m).read()
    except (struct.error, ValueError, IndexError, OverflowError, MemoryError) as exc:
        raise CheckpointError(
            f"{path} is not a whole GGUF file ({exc or type(exc).__name__}).",
            hint="copy or download it again",
        ) from exc
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read ({exc.strerror}).") from exc


class _Walker:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def read(self) -> GGUFFile:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise CapabilityError(f"{self._path} is GGUF version {version}, but 2 or 3 is needed.")
        tensors, pairs = self._number("Q"), self._number("Q")
        file = GGUFFile(self._path)
        for _ in range(pairs):
            key = self._string()
            file.metadata[key] = self._value(self._number("I"))
        entries = [self._entry() for _ in range(tensors)]
        step = file.metadata.get("general.alignment", 32)
        if not isinstance(step, int) or step <= 0:
            raise ValueError(f"its alignment is {step}")
        base = -(-self._at // step) * step
        for name, shape, type_id, offset in entries:
            file.tensors[name] = self._place(name, shape, type_id, base + offset)
        return file

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _take(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            raise ValueError("it ends too early")
        piece = self._data[self._at : self._at + count]
        self._at += count
        return piece

    def _string(self) -> str:
        # Vocabularies may hold pieces that are not valid UTF-8 alone.
        return self._take(self._number("Q")).decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind >= len(_SCALARS):
            raise ValueError(f"it holds a value of unknown type {kind}")
        value = self._number(_SCALARS[kind])
        return bool(value) if kind == _BOOL else value

    def _array(self) -> Any:
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        if kind == _ARRAY or kind >= len(_SCALARS):
            raise ValueError(f"it holds an array of type {kind}")
        dtype = np.dtype("<" + _SCALARS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype=dtype)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dims = self._string(), self._number("I")
        if dims > _MOST_DIMS:
            raise ValueError(f"tensor {name} has {dims} dimensions")
        shape = tuple(self._number("Q") for _ in range(dims))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _place(self, name: str, shape: tuple[int, ...], type_id: int, start: int) -> GGUFTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(type_id)]
        except (ValueError, KeyError):
            raise CapabilityError(
                f"{self._path} stores {name} as ggml type {type_id}, which is not known."
            ) from None
        if not shape or shape[-1] % block:
            raise ValueError(f"tensor {name} has the shape {shape}")
        stop = start + math.prod(shape) // block * size
        if stop > len(self._data):
            raise ValueError(f"it ends before the end of tensor {name}")
        return GGUFTensor(name, shape, type_id, start, stop)
