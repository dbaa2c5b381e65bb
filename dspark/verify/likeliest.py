"""The largest logit of every row, and rows that have none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.errors import CapabilityError, ShapeError

__all__ = ["check_finite", "check_matrix", "likeliest", "likeliest_unshaped"]


def check_matrix(logits: Tensor) -> None:
    """Refuse what are no rows of logits.

    Raises:
        ShapeError: If `logits` is not a matrix of floating-point numbers.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        shape = tuple(logits.shape)
        raise ShapeError(f"logits are {logits.dtype} {shape}, but must be floating point [R, V].")


def check_finite(logits: Tensor) -> None:
    """Refuse rows [R, V] that no token can be drawn from.

    Raises:
        CapabilityError: If the largest logit of a row is NaN or infinite.
    """
    _check_largest(logits.amax(dim=1).tolist())


def _check_largest(tops: Sequence[float]) -> None:
    for r, top in enumerate(tops):
        if not math.isfinite(top):
            raise CapabilityError(
                f"the largest logit of row {r} is {top}, but must be finite.",
                hint="the model's weights or activations overflow; try float32",
            )


def likeliest(shaped: Tensor) -> list[int]:
    """The token with the largest logit of every row of [R, V]: the lowest id among ties."""
    if shaped.device.type == "cpu" and shaped.dtype is torch.float32:
        # torch's own takes twenty times as long on a CPU (measured for 6 rows of 49,152).
        best: list[int] = shaped.detach().numpy().argmax(axis=1).tolist()
        return best
    return [int(token) for token in shaped.argmax(dim=1).tolist()]


def likeliest_unshaped(logits: Tensor) -> list[int]:
    """The token with the largest logit of rows that no parameter changes, in one pass over them.

    Args:
        logits: float [R, V] of any floating dtype.

    Raises:
        ShapeError: If `logits` is not a matrix of floating-point numbers.
        CapabilityError: If the largest logit of a row is NaN or infinite.
    """
    check_matrix(logits)
    rows = logits.detach().to(torch.float32)
    if rows.shape[0] == 0:
        return []
    tokens = likeliest(rows)  # where there is a NaN, it is that
    if rows.device.type == "cpu":
        host = rows.numpy()
        _check_largest([float(host[r, token]) for r, token in enumerate(tokens)])
    else:
        _check_largest(rows.amax(dim=1).tolist())
    return tokens
