"""Memory for weights in large pages."""

from __future__ import annotations

import errno
import mmap
import re
from pathlib import Path

import pytest
import torch

from dspark.adapters.fused import pages

needs_large_pages = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this system has no pages to ask for",
)


def flags_of(address: int) -> list[str]:
    """What the system knows of the memory at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().split("\n"):
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@needs_large_pages
def test_large_pages_are_asked_for() -> None:
    small, large = torch.rand(100), torch.rand(9 << 20)
    for tensor in (small, large):
        placed = pages.place(tensor)
        assert torch.equal(placed, tensor)
        assert placed.data_ptr() != tensor.data_ptr()
        assert "hg" in flags_of(placed.data_ptr())


def test_what_is_placed_does_not_lie_on_what_was_placed_before() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (2048, 2048), (7,), (1 << 21,), (1, 1), (3000, 1000)]
    tensors = [torch.rand(shape, generator=generator) for shape in shapes]
    tensors += [torch.arange(11, dtype=torch.uint8), torch.rand(4).bfloat16()]
    placed = [pages.place(tensor) for tensor in tensors]
    for one, other in zip(placed, tensors, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert one.data_ptr() % 64 == 0


def test_nothing_is_placed_in_no_bytes() -> None:
    assert pages.place(torch.empty(0, 5)).shape == (0, 5)


class Refused:
    """A kernel that was built without large pages."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def madvise(self, _: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize("lack", ["advice", "pages"])
def test_a_system_without_large_pages_keeps_the_tensor(
    monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    monkeypatch.setattr(pages, "_chunk", None)
    if lack == "advice":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
        monkeypatch.setattr(mmap, "mmap", Refused)
    tensor = torch.rand(10)
    assert pages.place(tensor) is tensor
