"""Mixture-of-experts layers whose result for a row does not depend on the rows that ride along.

transformers lets an experts implementation be registered; ours runs each expert that was hit on its
own rows, with the same kernels and row windows as every other linear layer (linear.py). An expert
may get a single row in plain decoding and several in verification, so the window matters here too.
Routers apply their weight by `nn.functional.linear` without being an nn.Linear; their weight is
replaced by one that brings its own product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dspark.adapters.hf.linear import KERNELS, RowWindow, run_windowed

__all__ = [
    "EXPERTS_NAME",
    "expert_shapes",
    "pack_experts",
    "use_row_stable_experts",
    "watch_routing",
]

EXPERTS_NAME = "dspark"
"""Name under which the implementation is registered with transformers."""

Windows = Mapping[tuple[int, int], RowWindow] | None


class _RoutingWeight(torch.Tensor):
    """A router's weight that runs `linear` with a row-stable product (its attribute `product`)."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.linear and isinstance(args[1], cls):
            rows = args[0].reshape(-1, args[0].shape[-1])
            weight: Any = args[1]
            out = run_windowed(weight.product, rows, weight.window)
            return out.view(*args[0].shape[:-1], -1)
        return super().__torch_function__(func, types, args, kwargs or {})


def _experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run every expert on the rows routed to it; [N, D] -> [N, D]."""
    out = torch.zeros_like(hidden_states)
    window_in, window_out = self.dspark_windows
    for expert in torch.unique(top_k_index).tolist():
        if expert >= len(self.dspark_products):
            continue
        up, down = self.dspark_products[expert]
        rows, place = torch.where(top_k_index == expert)
        inner = self._apply_gate(run_windowed(up, hidden_states[rows], window_in))
        result = run_windowed(down, inner, window_out) * top_k_weights[rows, place, None]
        # Experts are added in order of their number, whoever else was routed to them.
        out.index_add_(0, rows, result.to(out.dtype))
    return out


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _experts_forward)


def _expert_modules(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "_apply_gate") and hasattr(m, "gate_up_proj")]


def _routers(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        is_router = type(module).__name__.endswith("Router")
        if is_router and isinstance(weight, Tensor) and weight.dim() == 2:
            found.append(module)
    return found


def use_row_stable_experts(model: Any) -> None:
    """Select our implementation if the model has experts."""
    if _expert_modules(model):
        model.set_experts_implementation(EXPERTS_NAME)


def expert_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """Distinct (inputs, outputs) of the products that `pack_experts` makes."""
    found = set()
    for module in _expert_modules(model):
        for weight in (module.gate_up_proj, module.down_proj):
            found.add((int(weight.shape[2]), int(weight.shape[1])))
    for router in _routers(model):
        found.add((int(router.weight.shape[1]), int(router.weight.shape[0])))
    return sorted(found)


def pack_experts(model: nn.Module, kernel: str, windows: Windows) -> None:
    """Pack the weights of all experts and routers, in place, and let the originals go.

    Args:
        model: A model on which `use_row_stable_experts` was called.
        kernel: A name of KERNELS.
        windows: Row windows by shape, or None.
    """
    make = KERNELS[kernel]

    def window(weight: Tensor) -> RowWindow | None:
        return None if windows is None else windows[(weight.shape[-1], weight.shape[-2])]

    for module in _expert_modules(model):
        ups, downs = module.gate_up_proj.detach(), module.down_proj.detach()
        module.dspark_products = [
            (make(up, None), make(down, None)) for up, down in zip(ups, downs, strict=True)
        ]
        module.dspark_windows = (window(ups), window(downs))
        for name in ("gate_up_proj", "down_proj"):
            setattr(module, name, nn.Parameter(torch.empty(0), requires_grad=False))
    for router in _routers(model):
        weight = router.weight.detach()
        stable: Any = weight.as_subclass(_RoutingWeight)
        stable.product = make(weight, None)
        stable.window = window(weight)
        del router.weight
        router.weight = stable


@contextmanager
def watch_routing(model: nn.Module, note: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Report the routing of every forward inside the block.

    Args:
        model: A model with experts or without.
        note: Called with a layer of experts (counted among these) and what was chosen, [n, k].
    """

    def watcher(layer: int) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: note(layer, args[1])

    hooks = [
        module.register_forward_pre_hook(watcher(layer))
        for layer, module in enumerate(_expert_modules(model))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
