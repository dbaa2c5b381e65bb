"""The processes of a run: one, or several that torchrun started, each with a part of the work.

A step's forwards are dealt out in turn; weights, gradients and optimizer state are sharded over the
processes (torch's FSDP2). Losses are sums divided by the step's own total weight, so they do not
depend on who computed what, but for rounding. The first process writes files and talks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dspark.errors import ConfigError

__all__ = ["ALONE", "World", "full_tensor", "like", "open_world"]

_T = TypeVar("_T")
_MESSAGE_BYTES = 256


class World:
    """The processes of a run.

    Args:
        rank: Number of this one.
        size: How many there are.
        mesh: What shards are laid over, None for a single process.
    """

    def __init__(self, rank: int, size: int, mesh: DeviceMesh | None = None) -> None:
        self.rank = rank
        self.size = size
        self._mesh = mesh

    @property
    def is_first(self) -> bool:
        """This process writes files and talks."""
        return self.rank == 0

    def shard(self, network: nn.Module) -> None:
        """Spread a network's parameters over the processes, in place."""
        if self._mesh is not None:
            fully_shard(network, mesh=self._mesh)

    def deal(self, parts: list[_T]) -> list[tuple[_T, bool]]:
        """This process's parts of a step's forwards.

        Every process gets as many, since they wait for each other in each; one that has run out
        repeats a part that does not count.

        Args:
            parts: All parts, at least one.

        Returns:
            Parts, and whether they count.
        """
        rounds = -(-len(parts) // self.size)
        mine = parts[self.rank :: self.size]
        spare = [(parts[0], False)] * (rounds - len(mine))
        return [(part, True) for part in mine] + spare

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a CPU tensor over all processes."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def agree(self, reason: str | None) -> str | None:
        """What the first process says, for all of them."""
        if self.size == 1:
            return reason
        text = (reason or "").encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES)
        message = torch.tensor(list(text), dtype=torch.uint8, device=self.device)
        dist.broadcast(message, src=0)
        said = bytes(message.tolist()).decode(errors="replace").strip()
        return said or None

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    @property
    def device(self) -> torch.device:
        """Where messages between processes are."""
        kind = "cpu" if self._mesh is None else self._mesh.device_type
        return torch.device(kind)


ALONE = World(0, 1)
"""A single process."""


@contextmanager
def open_world(device: str) -> Iterator[World]:
    """The processes that torchrun started, or this one alone.

    Args:
        device: "auto" or a torch device; each process has one of its kind.

    Raises:
        ConfigError: If torchrun's variables make no sense.
    """
    try:
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as exc:
        raise ConfigError(f"the variables of torchrun are not numbers: {exc}.") from exc
    if size == 1:
        yield ALONE
        return
    kind = torch.device("cuda" if torch.cuda.is_available() else "cpu").type
    if device != "auto":
        kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield World(rank, size, init_device_mesh(kind, (size,)))
    finally:
        dist.destroy_process_group()


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor whole; all processes must ask for a sharded one together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(whole: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, laid out as another one is."""
    if isinstance(model, DTensor):
        return distribute_tensor(whole.to(model.device), model.device_mesh, model.placements)
    return whole
