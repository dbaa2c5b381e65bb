"""Noise of a whole vocabulary in float32, which narrows down the tokens that may be drawn.

Vectors are kept for a while: the rows of a position share one, and so do a draft and the target.

Letters: V vocabulary.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dspark.verify.noise_native import noise_library
from dspark.verify.noise_words import CHUNK, mix_array, vocabulary_words

__all__ = ["HELD", "NARROW", "UNIT", "forget_vectors", "noise_vector", "noise_vectors"]

HalfArray = NDArray[np.float32]

NARROW = 512
"""Up to this width rows are evaluated together, in float64 throughout."""

UNIT = 2.0**-53
"""The least uniform, and what all are multiples of."""

_CACHED = 64  # 12 MiB at V = 49 152, 64 MiB at V = 262 144
_CLAMP = np.float32(1 - 2.0**-10)
HELD = -1.93
"""Noise is held to some more than -1.94, by `_CLAMP`; above this it is what it should be."""

_kept: OrderedDict[tuple[int, int], HalfArray] = OrderedDict()
_lock = threading.Lock()


def noise_vectors(states: Sequence[int], size: int, threads: int = 1) -> list[HalfArray]:
    """Give float32 noise of tokens 0 .. size - 1, at most 2e-5 below the exact values.

    For w <= 1 - 2**-10 rounding w to float32 moves -log1p(-w) by at most 2**-25 / 2**-10 / 6.9
    (relative), and the two logarithms add a few units in the last place: under 2e-5 altogether.
    Larger w are clamped, which overestimates values under -1.93; that is the safe direction.

    Args:
        states: What the key, the stream and the position of each come to.
        size: V.
        threads: Threads that may make them.

    Returns:
        float32 [V] each; shared, not to be written to.
    """
    with _lock:
        found = {state: _kept.get((state, size)) for state in states}
    missing = [state for state, vector in found.items() if vector is None]
    library = noise_library() if missing and size > NARROW else None
    if library is not None:
        made = library.vectors(vocabulary_words(size), missing, threads)
    else:
        made = [_by_numpy(state, size) for state in missing]
    for vector in made:
        vector.flags.writeable = False
    found.update(zip(missing, made, strict=True))
    every = {state: vector for state, vector in found.items() if vector is not None}
    with _lock:
        for state, vector in every.items():
            _kept[state, size] = vector
            _kept.move_to_end((state, size))
        while len(_kept) > _CACHED:
            _kept.popitem(last=False)
    return [every[state] for state in states]


def noise_vector(state: int, size: int) -> HalfArray:
    """As `noise_vectors`, of one state."""
    return noise_vectors([state], size)[0]


def forget_vectors() -> None:
    """Forget what is kept, as for a test that takes another path."""
    with _lock:
        _kept.clear()


def _by_numpy(state: int, size: int) -> HalfArray:
    words = vocabulary_words(size)
    out = np.empty(size, dtype=np.float32)
    for start in range(0, size, CHUNK):
        bits = mix_array(words[start : start + CHUNK] ^ np.uint64(state))
        bits >>= np.uint64(11)
        part = out[start : start + CHUNK]
        part[:] = bits.view(np.int64)  # signed converts faster; 53 bits fit
        part *= np.float32(UNIT)
        np.clip(part, np.float32(UNIT), _CLAMP, out=part)
        np.log1p(np.negative(part, out=part), out=part)
        np.log(np.negative(part, out=part), out=part)
        np.negative(part, out=part)
    return out
