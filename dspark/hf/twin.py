"""A second module over the same weights, so that the user's own is never changed.

Wrapping a model for tree verification sets its attention function and replaces its linear layers.
Here that is done to a twin: a copy of the module tree whose parameters are views of the user's
storage. The user's module keeps its forward, its layers and its state dict.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dspark.adapters.hf import load
from dspark.adapters.hf.target import HFTarget
from dspark.errors import CapabilityError
from dspark.registry import LoadOptions

__all__ = ["signature_of", "wrap_shared"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_FREE_SHARE = 4
"""Weights are packed where free memory is this many times what the packed ones take."""


def wrap_shared(model: Any, *, exact: bool = False, pack: bool | None = None) -> HFTarget:
    """Make a target of a loaded transformers model without changing the model.

    Args:
        model: A causal LM.
        exact: Exact mode (docs/losslessness.md); packs the weights and checks them, which takes
            seconds.
        pack: Give the target linear weights packed for verification, a second copy of them; None
            does so on a CPU that has the memory.

    Returns:
        The target. It names no end tokens: whoever drives it decides where a text ends.

    Raises:
        CapabilityError: If the model cannot be tree-verified, or exact mode does not hold.
    """
    adapter = load.adapter_for(str(model.config.model_type))
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    load.refuse_model(model.config, adapter, name)
    _check(model, name, has_overrides=bool(adapter.config_overrides))
    wants_packed = _can_pack(model) if pack is None else pack
    options = LoadOptions(name=name, exact=exact, has_many_rows=not wants_packed)
    return load.wrap_model(_twin(model, name), adapter, options)


def signature_of(model: nn.Module) -> tuple[object, ...]:
    """What tells that a model's weights were changed, moved or replaced since.

    Two equal signatures of one model mean the same tensors with the same content, in the same
    modules, with the same forward hooks.
    """
    weights = tuple(
        (id(p), p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version)
        for p in (*model.parameters(), *model.buffers())
    )
    return (*weights, *_hooks(model))


def _hooks(model: nn.Module) -> Iterator[int]:
    """Forward hooks of the model's modules, by identity; transformers' own only look on."""
    for module in model.modules():
        for kind in _HOOKS:
            for hook in getattr(module, kind).values():
                if not str(getattr(hook, "__module__", "")).startswith("transformers."):
                    yield id(hook)


def _check(model: Any, name: str, *, has_overrides: bool) -> None:
    """Refuse models whose weights or forwards are not the plain ones that a twin can share."""
    reason = None
    parameters = list(model.parameters())
    kinds = {type(p) for p in parameters} - {nn.Parameter, Tensor}
    if has_overrides:
        reason = "its family needs settings that a model must be loaded with"
    elif kinds:
        reason = f"its weights are of type {min(kind.__name__ for kind in kinds)}"
    elif not all(p.is_floating_point() for p in parameters):
        reason = "its weights are quantised"
    elif len({(p.device, p.dtype) for p in parameters}) > 1:
        reason = "its weights are spread over several devices or dtypes"
    elif parameters[0].device.type == "meta":
        reason = "its weights are not in memory"
    elif any(_hooks(model)) or any("forward" in vars(m) for m in model.modules()):
        reason = "its modules have forward hooks, or forwards that were replaced"
    if reason is not None:
        raise CapabilityError(f"{name} cannot be tree-verified in place: {reason}.")


def _can_pack(model: nn.Module) -> bool:
    """Packed kernels are for CPUs, and a second copy of the weights must fit easily."""
    weights = list(model.parameters())
    if weights[0].device.type != "cpu":
        return False
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system tells
        return False
    return free >= _FREE_SHARE * sum(w.numel() * w.element_size() for w in weights)


def _twin(model: Any, name: str) -> Any:
    memo: dict[int, Any] = {id(b): b for b in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    own_generate = vars(model).get("generate")
    if own_generate is not None:
        memo[id(own_generate)] = None
    try:
        with torch.no_grad():
            return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as exc:
        raise CapabilityError(f"{name} has parts that cannot be copied: {exc}") from exc
