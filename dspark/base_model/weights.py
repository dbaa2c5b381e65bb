"""Weights for a model to be built from: brought to a device, or out of a dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dspark.base_model.expert_store import ExpertStore, ExpertWeights
from dspark.base_model.numerics import WeightSource
from dspark.base_model.stored import StoredWeight
from dspark.errors import CheckpointError

__all__ = ["DictSource", "ExpertsOnDevice", "OnDevice"]


class DictSource:
    """A weight source over tensors in memory.

    Args:
        tensors: By official name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            CheckpointError: If there is none.
        """
        if name not in self._tensors:
            raise CheckpointError(f"there is no tensor {name}.")
        return self._tensors[name]

    def stored(self, name: str) -> StoredWeight:
        """`name`.weight with `name`.scale, if there is one."""
        scale = self._tensors.get(f"{name}.scale")
        return StoredWeight.of(name, self.tensor(f"{name}.weight"), scale)


class OnDevice:
    """A weight source whose tensors are brought to a device.

    Args:
        source: Where they come from.
        device: Where they are wanted.
    """

    def __init__(self, source: WeightSource, device: torch.device) -> None:
        self._source, self._device = source, device

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, on the device."""
        return self._source.tensor(name).to(self._device)

    def stored(self, name: str) -> StoredWeight:
        """The weight of that name, on the device."""
        return _moved(self._source.stored(name), self._device)


class ExpertsOnDevice:
    """The experts of one layer's device.

    Args:
        store: Where their weights are.
        device: Where they are wanted.
    """

    def __init__(self, store: ExpertStore, device: torch.device) -> None:
        self._store, self._device = store, device

    def each(self, prefix: str, experts: Sequence[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """Experts of a layer, one at a time, in the order asked for.

        Args:
            prefix: Such as "layers.3.ffn.experts".
            experts: Their numbers.
        """
        for expert in experts:
            of = self._store.fetch(prefix, expert)
            yield (
                expert,
                ExpertWeights(
                    w1=_moved(of.w1, self._device),
                    w2=_moved(of.w2, self._device),
                    w3=_moved(of.w3, self._device),
                ),
            )


def _moved(stored: StoredWeight, device: torch.device) -> StoredWeight:
    if stored.weight.device == device:
        return stored
    scale = None if stored.scale is None else stored.scale.to(device)
    return StoredWeight(stored.weight.to(device), scale)
