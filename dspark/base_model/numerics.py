"""How V4 computes: dtypes, matrix products whose rows do not depend on their neighbours, norms.

Letters: n rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dspark.base_model.fp8 import act_quant
from dspark.base_model.stored import StoredWeight

if TYPE_CHECKING:
    from dspark.base_model.native_experts import ExpertKernels

__all__ = ["EXACT_ROWS", "Linear", "Numerics", "WeightSource", "rms_norm", "stable_top"]

EXACT_ROWS = 16
"""Rows of every matrix product in exact mode: one shape, so one order of summing."""

_VECTOR = 64
"""Elements that fill whole vectors on every machine known."""

_ONE_THREAD = 32000
"""Elements that torch does not part between threads."""

_CHUNK_BYTES = 32 * 2**20
"""Weights are dequantised in pieces of about this size: it stays in the cache, and no layer ever
exists a second time in memory."""


class WeightSource(Protocol):
    """Where weights come from, by official name: a checkpoint, or tensors in memory."""

    def __contains__(self, name: str) -> bool:
        """True if there is a tensor of that name."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name."""
        ...

    def stored(self, name: str) -> StoredWeight:
        """`name`.weight with its scale, as stored."""
        ...


@dataclass(slots=True)
class Numerics:
    """Settings that every part of a model shares; `exact` may change between forwards.

    Attributes:
        dtype: Dtype of activations.
        compute: Dtype of the operands of matrix products.
        exact: Rows are bitwise independent of the rows that ride along.
        fake_quant: Activations are rounded to FP8 and FP4 where the release's kernels do.
        kernels: What runs routed experts instead of torch; None for torch.
    """

    dtype: torch.dtype
    compute: torch.dtype
    exact: bool = False
    fake_quant: bool = False
    kernels: ExpertKernels | None = None
    _scratch: dict[torch.device, Tensor] = field(default_factory=dict)

    @property
    def wide(self) -> torch.dtype:
        """Dtype of norms, softmaxes, hyper-connections, compressors, router and head."""
        return torch.promote_types(self.dtype, torch.float32)

    @staticmethod
    def of(dtype: torch.dtype, device: torch.device) -> Numerics:
        """Settings for a dtype on a device.

        A CPU without bfloat16 instructions multiplies it slowly and not reproducibly, so products
        there run in float32 and are rounded once.
        """
        wide = torch.promote_types(dtype, torch.float32)
        return Numerics(dtype=dtype, compute=wide if device.type == "cpu" else dtype)

    def numbers(self, stored: StoredWeight, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        """Rows of a stored weight, valid until the next call.

        They are written to one buffer for all layers: fresh memory costs more than the decoding.
        """
        if stored.weight.dtype == dtype:
            return stored.dequantise(dtype, start, stop)
        device, count = stored.weight.device, (stop - start) * stored.shape[1]
        scratch = self._scratch.get(device)
        if scratch is None or scratch.dtype != dtype or scratch.numel() < count:
            with torch.inference_mode(False):  # drafts in training use it, too
                scratch = torch.empty(count, dtype=dtype, device=device)
            self._scratch[device] = scratch
        out = scratch[:count].view(stop - start, stored.shape[1])
        return stored.dequantise(dtype, start, stop, out=out)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply x [n, I] by weight [O, I] transposed: [n, O]."""
        n = x.shape[0]
        if not self.exact or n == 0:
            return F.linear(x, weight)
        padded = F.pad(x, (0, 0, 0, -n % EXACT_ROWS))
        parts = [F.linear(part, weight) for part in padded.split(EXACT_ROWS)]
        return torch.cat(parts)[:n] if len(parts) > 1 else parts[0][:n]

    def smooth(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """An element-wise function such as the sigmoid, of x [n, ...].

        Vectorised code takes what does not fill a vector through other code, which rounds
        otherwise; so in exact mode rows fill whole vectors and few enough go at once that threads
        do not cut them up.
        """
        if not self.exact or x.numel() == 0:
            return function(x)
        flat = x.flatten(1)
        columns = flat.shape[1]
        padded = F.pad(flat, (0, -columns % _VECTOR)).contiguous()
        rows = max(1, _ONE_THREAD // padded.shape[1])
        parts = [function(part) for part in padded.split(rows)]
        return torch.cat(parts)[:, :columns].reshape(x.shape)


class Linear:
    """A matrix product with its weight kept as stored: FP4, FP8 or float.

    Args:
        stored: The weight [O, I].
        numerics: Shared settings.
        is_wide: Multiply and return in `numerics.wide`, as the release does for compressors,
            router and head; otherwise in `numerics.compute`, returned in `numerics.dtype`.
    """

    __slots__ = ("_dtype", "_numerics", "is_wide", "stored")

    def __init__(self, stored: StoredWeight, numerics: Numerics, *, is_wide: bool = False) -> None:
        self.stored = stored
        self.is_wide = is_wide
        self._numerics = numerics

    def __call__(self, x: Tensor) -> Tensor:
        """[n, I] -> [n, O]."""
        numerics = self._numerics
        compute = numerics.wide if self.is_wide else numerics.compute
        outputs, inputs = self.stored.shape
        if numerics.fake_quant and self.stored.kind != "float":
            x = act_quant(x)
        x = x.to(compute)
        step = max(64, _CHUNK_BYTES // (inputs * compute.itemsize) // 64 * 64)
        parts = [
            numerics.product(x, numerics.numbers(self.stored, compute, a, min(a + step, outputs)))
            for a in range(0, outputs, step)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return out if self.is_wide else out.to(numerics.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, wide: torch.dtype) -> Tensor:
    """Scale x to weight * x / sqrt(mean(x^2) + eps) over the last dim, in `wide`, cast back once.

    Args:
        x: [..., D].
        weight: [D], or None for no weight.
        eps: Added to the mean.
        wide: Dtype to compute in.
    """
    y = x.to(wide)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return y.to(x.dtype)


def stable_top(scores: Tensor, count: int) -> Tensor:
    """The `count` highest scores of each row, ties to the lowest index.

    torch.topk breaks ties differently for different lengths, so a prefill and a decode step would
    choose differently wherever a score occurs twice (all heads of an indexer silent: exact zeros).

    Args:
        scores: [n, E]; -inf marks what may not be chosen.
        count: How many.

    Returns:
        bool [n, E]; fewer than `count` are chosen in a row with fewer finite scores.
    """
    scores = scores.nan_to_num(torch.inf, posinf=torch.inf, neginf=-torch.inf)  # NaN must show
    allowed = scores > -torch.inf
    if scores.shape[1] <= count:
        return allowed
    threshold = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = scores > threshold
    ties = (scores == threshold) & allowed
    room = count - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= room))
