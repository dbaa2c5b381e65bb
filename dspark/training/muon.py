"""Muon for the matrices of a draft's layers, in the precision that the machine computes quickly.

W <- W (1 - lr wd) - lr 0.2 sqrt(max(rows, columns)) NS(mu M + (1 - mu) G), M <- mu M + (1 - mu) G
(Jordan et al., 2024; the size of the update as in Liu et al., arXiv 2502.16982, equation 4, so that
AdamW's learning rates fit). `torch.optim.Muon` computes NS in bfloat16 alone, which takes a CPU
without its instructions seconds a step; here it is float32 there, and bfloat16 elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dspark.devices import has_native_bfloat16

__all__ = ["Muon"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_UPDATE_SIZE = 0.2
_SMALLEST = 1e-7


class Muon(Optimizer):
    """Momentum, made orthogonal.

    Args:
        parameters: Matrices; sharded ones (DTensor) are put together for the products.
        lr: Learning rate, in AdamW's terms.
        momentum: mu.
        weight_decay: Per unit of learning rate.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Any) -> float: ...

    @torch.no_grad()
    def step(self, closure: Any = None) -> float | None:
        """Update every matrix that has a gradient."""
        if closure is not None:
            raise TypeError("Muon takes no closure.")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return None

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum: Tensor = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        wanted = torch.lerp(gradient, momentum, group["momentum"])
        size = _UPDATE_SIZE * max(parameter.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(_orthogonal(wanted), alpha=-group["lr"] * size)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Newton-Schulz on [R, C]: singular values moved near 1, in the layout of the matrix."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(matrix, DTensor):
        whole = _orthogonal(matrix.full_tensor())
        return distribute_tensor(whole, matrix.device_mesh, matrix.placements)
    is_quick = matrix.device.type != "cpu" or has_native_bfloat16()
    x = matrix.to(torch.bfloat16 if is_quick else torch.float32)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm().clamp_min(_SMALLEST)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).to(matrix.dtype)
