"""Draft modules on packed weights: which of their linear layers, and rounded to what.

A draft decides about speed alone, so its weights may be rounded where that costs no acceptance:
every rule is lossless with whatever law the module, as it runs, has drawn from.
"""

from __future__ import annotations

import logging
from typing import Protocol, runtime_checkable

from torch import nn

from dspark.adapters.fused.draft_runner import FusedRunner, check_fused
from dspark.adapters.fused.layout import NotFused
from dspark.adapters.fused.library import Library, load_library
from dspark.adapters.fused.linear import PackedLinear, can_pack
from dspark.adapters.fused.packing import KINDS
from dspark.draft.dspark_module import DSparkModule
from dspark.folders import cache_root
from dspark.native import wanted_path

__all__ = ["LEAST_LAYER", "LEAST_WEIGHTS", "pack_draft"]

logger = logging.getLogger(__name__)

LEAST_LAYER = 1 << 18
"""Weights of a layer from which int8 is faster than torch for one row as for several; smaller ones
stay as they are unless asked for (benchmarks/draft_quant.py, docs/quantised.md)."""

LEAST_WEIGHTS = 1_000_000
"""Weights in such layers from which a draft is packed unasked: compiling would not pay before."""


@runtime_checkable
class _TakesHead(Protocol):
    """A module that predicts with rows of its target's head (`DSparkModule`)."""

    def take_head(self) -> nn.Linear | None:
        """Those rows as a layer, for `use_head`; None where it does not use rows."""
        ...

    def use_head(self, layer: nn.Module) -> None:
        """Predict with a layer in place of the rows."""
        ...


def pack_draft(module: object, quant: str, path: str) -> str:
    """Put the linear layers of a draft module on packed weights where that makes it faster.

    Args:
        module: The module, loaded and in eval mode; its layers are replaced.
        quant: One of `dspark.registry.DRAFT_QUANTS`. "auto" and "none" pack a module that is large
            enough, "int8" one of any size.
        path: One of `dspark.native.PATHS`: "plain" packs nothing, "fused" one of any size.

    Returns:
        How most of the weights are stored now (packing.KINDS), "" if nothing was packed.

    Raises:
        ConfigError: If the path is none of PATHS.
    """
    wanted = wanted_path(path)
    rounding = "none" if quant == "none" else "int8"
    is_asked = wanted == "fused" or quant == "int8"
    if wanted == "plain" or not isinstance(module, nn.Module):
        return ""
    found = _layers(module, rounding, 0 if is_asked else LEAST_LAYER)
    head = module.take_head() if isinstance(module, _TakesHead) else None
    if head is not None and not can_pack(head, rounding):
        head = None
    weights = sum(layer.weight.numel() for _, _, layer in found)
    weights += 0 if head is None else head.weight.numel()
    if not weights or (weights < LEAST_WEIGHTS and not is_asked):
        return ""
    try:
        library = load_library(cache_root() / "kernels")
    except NotFused as exc:
        logger.debug("the draft stays on stock layers: %s", exc)
        return ""
    runner = _runner(module, library, rounding)
    rest = [one for one in found if one[2].weight.numel()]
    stored = _replace(module, rest, head, library, rounding)
    if runner is not None:
        runner.use_heads()
        for kind, count in runner.stored.items():
            stored[kind] += count
    return max(KINDS, key=lambda kind: stored[kind])


def _runner(module: nn.Module, library: Library, quant: str) -> FusedRunner | None:
    """Give a module that predicts blocks its forwards in the kernels, if they compute them."""
    if not isinstance(module, DSparkModule):
        return None
    try:
        check_fused(module, library.lanes, quant)
    except NotFused as exc:
        logger.debug("the draft's blocks stay on the plain path: %s", exc)
        return None
    module.runner = runner = FusedRunner(module, library, quant)
    return runner


def _layers(module: nn.Module, quant: str, least: int) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Layers that the kernels can run, of so many weights at least: parent, name and layer.

    A layer with one output, as confidence heads are, would be a panel of which most is padding.
    """
    return [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
        and child.out_features > 1
        and child.weight.numel() >= least
        and can_pack(child, quant)
    ]


def _replace(
    module: nn.Module,
    found: list[tuple[nn.Module, str, nn.Linear]],
    head: nn.Linear | None,
    library: Library,
    quant: str,
) -> dict[str, int]:
    stored = dict.fromkeys(KINDS, 0)
    for parent, name, layer in found:
        packed = PackedLinear(layer, library, quant)
        setattr(parent, name, packed)
        stored[packed.kind] += layer.weight.numel()
    if head is not None and isinstance(module, _TakesHead):
        packed = PackedLinear(head, library, quant)
        module.use_head(packed)
        stored[packed.kind] += head.weight.numel()
    return stored
