"""Draws with shared noise from rows that nothing but a temperature shapes, in one pass.

It is what `dspark.verify.sampling.shape_logits` and `dspark.verify.noise.perturbed_argmax` give, to
the bit of every shaped logit, without storing any: most rounds draw one token from each of a few
rows, and passes over a vocabulary that lies in no cache are most of what that takes.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.verify import noise
from dspark.verify.noise_native import noise_library
from dspark.verify.noise_vectors import HELD, NARROW, noise_vectors

__all__ = ["scaled_argmax"]

_MOST_ROWS = 64  # more are shaped as they always were: one noise vector each lies in memory


def scaled_argmax(
    logits: Tensor, scales: Sequence[float], states: Sequence[int]
) -> list[int] | None:
    """Draw one token per row.

    Args:
        logits: float [R, V] of the target, raw.
        scales: What each row is divided by.
        states: State of each row's noise (`dspark.verify.noise.states_of`).

    Returns:
        The tokens; None where rows lie elsewhere than in host memory, in another dtype than
        float32 or narrow, a row is none that a token can be drawn from, or one pass does not tell.
    """
    is_here = logits.device.type == "cpu" and logits.dtype is torch.float32
    if not is_here or not 0 < len(states) <= _MOST_ROWS or logits.shape[1] <= NARROW:
        return None
    if any(scale != 1 and np.float32(scale) == 1 for scale in scales):
        return None  # the kernel, to which these are 1, does not shape as torch does
    library = noise_library()
    rows: NDArray[np.float32] = logits.detach().numpy()
    if library is None or not rows.flags.c_contiguous:
        return None
    threads = torch.get_num_threads()
    vectors = noise_vectors(states, rows.shape[1], threads)
    close = library.rows(rows, scales, vectors, noise.SLACK, threads)
    tokens = []
    for r, (count, top) in enumerate(zip(close.counts, close.tops, strict=True)):
        if not 0 < count <= close.room or not abs(top) <= noise.LARGE:
            return None
        ids = close.ids[r, :count]
        if count == 1 and vectors[r][ids[0]] > HELD:
            tokens.append(int(ids[0]))  # no other token can be the best
            continue
        values = rows[r, ids]
        if scales[r] != 1:
            values = (values - np.float32(close.most[r])) / np.float32(scales[r])
        ids, exact = noise.ranked(values, states[r], ids)
        if exact[0] < top - noise.SLACK / 2:
            # Vectors hold the lowest noise too high, so `top` may be, and the best be left out.
            return None
        tokens.append(int(ids[0]))
    return tokens
