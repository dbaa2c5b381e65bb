"""Memory for weights in large pages, where the system has them.

A step streams all weights once. In pages of 4 kB that is one address translation for every 64
cache lines, which in a virtual machine costs two walks of page tables. Linux gives pages of 2 MB to
whoever asks for them; elsewhere, and where it has none to give, memory is as it ever was.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

__all__ = ["place"]

_PAGE = 2 << 20
_CHUNK = 32 << 20
"""Bytes that are asked for at once: many matrices are smaller than a large page."""

_ALIGNMENT = 64


class _Chunk:
    """Memory that is handed out from its start; it lives as long as a tensor in it."""

    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        everything = torch.frombuffer(memory, dtype=torch.uint8)
        start = -everything.data_ptr() % _PAGE
        self._free = everything[start : start + size]

    def take(self, size: int) -> Tensor | None:
        """Some bytes, or None if there are not so many left."""
        if size > self._free.numel():
            return None
        taken = self._free[:size]
        self._free = self._free[-(-size // _ALIGNMENT) * _ALIGNMENT :]
        return taken


_chunk: _Chunk | None = None


def place(tensor: Tensor) -> Tensor:
    """A copy in memory for which large pages were asked, or the tensor itself where none are.

    Args:
        tensor: Contiguous, on the CPU.
    """
    global _chunk
    size = tensor.numel() * tensor.element_size()
    if not hasattr(mmap, "MADV_HUGEPAGE") or size == 0:
        return tensor
    try:
        if size > _CHUNK:
            room = _Chunk(size).take(size)
        else:
            room = None if _chunk is None else _chunk.take(size)
            if room is None:
                _chunk = _Chunk(_CHUNK)
                room = _chunk.take(size)
    except OSError:  # no memory of this kind; a kernel without large pages refuses the advice
        return tensor
    if room is None:
        return tensor
    return room.view(tensor.dtype).view(tensor.shape).copy_(tensor)
