"""Muon for matrices, AdamW for the rest, as DeepSeek-V4 was trained.

Muon (V4's report, section 2.4): M <- mu M + G; O = NS(mu M + G) scaled by 0.18 sqrt(max(rows,
columns)), so that its size is that of an AdamW update; W <- W (1 - lr wd) - lr O. NS makes the
singular values equal: quick steps of X <- a X + b (X X^T) X + c (X X^T)^2 X, eight in the report,
then some that settle at 1, two there. Five quick ones alone bring them to 0.7 to 1.2 at half the
time (Jordan et al., "Muon", 2024). `torch.optim.Muon` has one set of coefficients for all steps,
takes no stacks of matrices and computes in bfloat16, which a CPU without its instructions does
slowly.

Embedding, head, norms, biases, sinks, position biases and scales go to AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dspark.errors import CheckpointError

__all__ = ["MuonAdamW", "is_muon_matrix", "orthogonalise"]

_QUICK = (3.4445, -4.7750, 2.0315)
_SETTLE = (2.0, -1.5, 0.5)
_UPDATE_SIZE = 0.18
_TABLES = ("embed", "head", "markov_w1", "markov_w2", "ape", "confidence_head")
_DECAYED = ("embed", "head", "markov_w1", "markov_w2")
_CHUNK = 1 << 20  # numbers orthogonalised at a time: what is between the products stays cached


def is_muon_matrix(name: str, parameter: Tensor) -> bool:
    """True for the parameters that Muon trains, stacks of matrices among them."""
    return parameter.dim() >= 2 and not any(part in _TABLES for part in name.split("."))


def orthogonalise(matrices: Tensor, steps: tuple[int, int] = (8, 2)) -> Tensor:
    """Newton-Schulz: matrices [K, R, C] with R <= C made nearly orthogonal.

    Args:
        matrices: A stack of them.
        steps: Quick ones, and ones that settle.
    """
    x = matrices / matrices.flatten(1).norm(dim=1).clamp_min(1e-20)[:, None, None]
    for (a, b, c), count in zip((_QUICK, _SETTLE), steps, strict=True):
        for _ in range(count):
            gram = torch.bmm(x, x.transpose(1, 2))
            mixed = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, mixed, x, beta=a)
    out: Tensor = x
    return out


class MuonAdamW:
    """Both optimizers over named parameters.

    Args:
        parameters: By name; the name decides which optimizer trains one.
        momentum: Of Muon.
        betas: Of AdamW.
        weight_decay: Of matrices, embedding and head, per unit of learning rate.
        clip: Longest gradient of AdamW's parameters; Muon's updates have one size.
        newton_schulz: Steps of Muon, quick and settling.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        momentum: float,
        betas: tuple[float, float],
        weight_decay: float,
        clip: float,
        newton_schulz: tuple[int, int] = (8, 2),
    ) -> None:
        self._steps = newton_schulz
        named = dict(parameters)
        self._matrices = {n: p for n, p in named.items() if is_muon_matrix(n, p)}
        self._others = {n: p for n, p in named.items() if n not in self._matrices}
        self._momenta = {n: torch.zeros_like(p) for n, p in self._matrices.items()}
        self._momentum, self._decay, self._clip = momentum, weight_decay, clip
        decayed = [p for n, p in self._others.items() if set(n.split(".")) & set(_DECAYED)]
        plain = [p for n, p in self._others.items() if not set(n.split(".")) & set(_DECAYED)]
        self._adam = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=1.0,
            betas=betas,
            eps=1e-10,
            foreach=False,
        )

    def step(self, muon_lr: float, adam_lr: float) -> float:
        """Update all parameters that have gradients, and drop these.

        Returns:
            Length of the gradient of AdamW's parameters.
        """
        length = torch.nn.utils.clip_grad_norm_(self._others.values(), self._clip)
        for group in self._adam.param_groups:
            group["lr"] = adam_lr
        self._adam.step()
        self._step_matrices(muon_lr)
        for parameter in (*self._matrices.values(), *self._others.values()):
            parameter.grad = None
        return float(length)

    @torch.no_grad()
    def _step_matrices(self, lr: float) -> None:
        for name, parameter in self._matrices.items():
            if parameter.grad is None:
                continue
            momentum = self._momenta[name].mul_(self._momentum).add_(parameter.grad)
            wanted = parameter.grad.add_(momentum, alpha=self._momentum)
            rows, columns = parameter.shape[-2:]
            stack = wanted.reshape(-1, rows, columns)
            size = _UPDATE_SIZE * max(rows, columns) ** 0.5
            parameter.mul_(1 - lr * self._decay)
            target = parameter.view(-1, rows, columns)
            chunk = max(1, _CHUNK // (rows * columns))
            for a in range(0, len(stack), chunk):
                part = stack[a : a + chunk]
                if rows > columns:
                    update = orthogonalise(part.transpose(1, 2), self._steps).transpose(1, 2)
                else:
                    update = orthogonalise(part, self._steps)
                target[a : a + chunk].add_(update, alpha=-lr * size)

    def tensors(self) -> dict[str, Tensor]:
        """All state by name, for a checkpoint."""
        found = {f"muon.{name}": momentum for name, momentum in self._momenta.items()}
        for name, parameter in self._others.items():
            for key, value in self._adam.state.get(parameter, {}).items():
                found[f"adam.{key}.{name}"] = value
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state of a checkpoint.

        Raises:
            CheckpointError: If a momentum is missing or of another shape.
        """
        for name, momentum in self._momenta.items():
            stored = tensors.get(f"muon.{name}")
            if stored is None or stored.shape != momentum.shape:
                raise CheckpointError(f"the state of training has no momentum of {name}.")
            momentum.copy_(stored)
        for name, parameter in self._others.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            found = {key: tensors.get(f"adam.{key}.{name}") for key in keys}
            if all(value is not None for value in found.values()):
                self._adam.state[parameter] = {
                    k: v.clone() for k, v in found.items() if v is not None
                }
