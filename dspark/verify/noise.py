"""Counter-based noise: every random number is a pure function of the words that name it.

A word is one integer of the name: seed, sample index, stream, counters, token id. Words are chained
through a 64-bit finaliser, so a number never depends on what was asked for before, on the batch, or
on whether a whole vocabulary or a few ids were asked for.

Perturbing logits with Gumbel noise and taking the maximum draws from their softmax; taking the m
largest draws m tokens without replacement, best first. Uniforms have 53 bits and are computed in
float64: 24-bit uniforms would cap the noise at 16.6 and bend the tails.

Speed: for a wide vocabulary a float32 approximation of the noise, shared by all rows of the same
key and position, selects every token that comes within a proven error bound of a value that is
already certain; only those are evaluated in float64. The result is the brute-force one.

Sources: finaliser: Stafford's variant 13 as in SplitMix64 (Steele, Lea, Flood 2014); Gumbel top-m:
Kool, van Hoof, Welling 2019; coupling by shared noise: Daliri, Musco, Suresh 2024.

Letters: R rows, V vocabulary, m best tokens asked for, n ids asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.errors import CapabilityError, ConfigError, ShapeError
from dspark.verify.noise_native import noise_library
from dspark.verify.noise_vectors import NARROW, UNIT, noise_vector, noise_vectors
from dspark.verify.noise_words import extend, mix_array, token_words, vocabulary_words

__all__ = [
    "LARGE",
    "MAX_GUMBEL",
    "SLACK",
    "NoiseKey",
    "Stream",
    "approximate_gumbel",
    "draft_gumbel",
    "draft_topk",
    "gumbel",
    "perturbed_argmax",
    "perturbed_topk",
    "ranked",
    "state_of",
    "states_of",
    "uniform",
]

FloatArray = NDArray[np.float64]
HalfArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
WordArray = NDArray[np.uint64]

_MASK = (1 << 64) - 1

MAX_GUMBEL = 36.75  # above the largest value that can occur, 53 ln 2; the smallest is -3.61
_SPARSE = 1024  # rows with no more finite entries than this are evaluated on those alone
_BLOCK = 256  # width of the blocks whose maxima bound the m-th largest value
_FEW_ROWS = 8  # whose states are chained one by one, which is faster than by array
# Five times the noise's own bound (see `noise_vector`), and float32 rounding of logits.
NOISE_ERROR = 1e-4
ROUNDING = 2.0**-22
LARGE = 1000.0  # perturbed values up to which the kernels' slack is enough
SLACK = 2 * (NOISE_ERROR + ROUNDING * (LARGE + MAX_GUMBEL))  # errors of two sums, there


class Stream(IntEnum):
    """Independent noise streams of one key."""

    COUPLED = 1  # shared by target and drafter, by output position
    MATCH = 2  # the target's own under sample-match, by output position
    DRAFT = 3  # drafts under the rejection rules, by round and node
    RULE = 4  # acceptance and closing draws of the rejection rules


@dataclass(frozen=True, slots=True)
class NoiseKey:
    """What names the noise of one sample of one request.

    Attributes:
        seed: 0 .. 2**64 - 1.
        sample: Index of the sample among the request's n, >= 0.

    Raises:
        ConfigError: If the seed or the sample index is out of range.
    """

    seed: int
    sample: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.seed <= _MASK:
            raise ConfigError(f"seed is {self.seed}, but must be from 0 to 2**64 - 1.")
        if not 0 <= self.sample <= _MASK:
            raise ConfigError(f"sample is {self.sample}, but must be from 0 to 2**64 - 1.")


@lru_cache(maxsize=1 << 12)
def _stream_state(key: NoiseKey, stream: Stream) -> int:
    """The state that all noise of one stream of a key starts from."""
    return extend(0, (key.seed, key.sample, stream))


def state_of(key: NoiseKey, stream: Stream, *counters: int) -> int:
    """The state named by a key, a stream and counters."""
    return extend(_stream_state(key, stream), counters)


def _bits(state: int, ids: IntArray) -> WordArray:
    """64 bits for each token id: the state with the id as one more word."""
    return mix_array(token_words(ids) ^ np.uint64(state))


def _unit(bits: WordArray) -> FloatArray:
    """Map 64 bits to multiples of 2**-53 in [2**-53, 1 - 2**-53]."""
    values: FloatArray = np.maximum(bits >> np.uint64(11), np.uint64(1)).astype(np.float64) * UNIT
    return values


def _to_gumbel(bits: WordArray) -> FloatArray:
    """Map 64 bits to standard Gumbel values in [-3.61, 36.74].

    With w the uniform, -log(-log1p(-w)) is the inverse CDF at 1 - w: the large values come from
    small w, where float64 is dense, so the tail is resolved to its end.
    """
    values: FloatArray = -np.log(-np.log1p(-_unit(bits)))
    return values


def gumbel(key: NoiseKey, position: int, token_ids: Sequence[int] | IntArray) -> FloatArray:
    """Give the coupled rule's noise at an output position: float64 [n] for token ids [n]."""
    ids = np.asarray(token_ids, dtype=np.int64)
    return _to_gumbel(_bits(state_of(key, Stream.COUPLED, position), ids))


def draft_gumbel(
    key: NoiseKey, round_index: int, node: int, token_ids: Sequence[int] | IntArray
) -> FloatArray:
    """Give the noise with which children of a node are drawn under the rejection rules.

    Args:
        key: The sample's key.
        round_index: Number of the round.
        node: The parent whose children are drawn, -1 for the anchor.
        token_ids: int64 [n].

    Returns:
        float64 [n], standard Gumbel, independent of every other stream.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    return _to_gumbel(_bits(state_of(key, Stream.DRAFT, round_index, node), ids))


def uniform(key: NoiseKey, *counters: int) -> float:
    """Give one uniform of the rejection rules.

    Args:
        key: The sample's key.
        counters: What the number is for; any integers.

    Returns:
        A multiple of 2**-53, strictly between 0 and 1.
    """
    bits = state_of(key, Stream.RULE, *counters)
    return max(bits >> 11, 1) * UNIT


def _ranked(row: HalfArray, state: int, ids: IntArray) -> tuple[IntArray, FloatArray]:
    return ranked(row[ids], state, ids)


def ranked(values: HalfArray, state: int, ids: IntArray) -> tuple[IntArray, FloatArray]:
    """Perturb some tokens exactly and sort them by falling value, then rising id.

    Args:
        values: float32 [n], their shaped logits.
        state: Of the noise.
        ids: int64 [n], the tokens.

    Returns:
        The tokens, and float64 [n], their perturbed values.
    """
    exact = values.astype(np.float64) + _to_gumbel(_bits(state, ids))
    order = np.lexsort((ids, -exact))
    return ids[order], exact[order]


def _floor(values: HalfArray, m: int) -> float:
    """Give a bound that at least m of `values` reach, and not many more."""
    if m == 1:
        return float(values.max())
    blocks = values.shape[0] // _BLOCK
    if m * 4 > blocks:
        return float(np.partition(values, -m)[-m])
    tops = values[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
    return float(np.partition(tops, -m)[-m])


def _best(row: HalfArray, state: int, m: int) -> tuple[IntArray, FloatArray]:
    """Find the m largest perturbed values of one row [V]; fewer if fewer are finite."""
    found = _best_natively(row, state, m)
    if found is not None:
        return found
    is_finite = row > -np.inf
    if np.count_nonzero(is_finite) <= max(_SPARSE, 4 * m):
        ids, values = _ranked(row, state, np.flatnonzero(is_finite))
        return ids[:m], values[:m]
    approximate = row + noise_vector(state, row.shape[0])
    floor = _floor(approximate, m)
    floor -= 2 * (NOISE_ERROR + ROUNDING * (abs(floor) + MAX_GUMBEL))  # spares a second pass
    ids, values = _ranked(row, state, np.flatnonzero(approximate >= floor))
    # At least m exact values reach values[m - 1], so nothing below it can be among the m best,
    # and whatever reaches it exactly comes within the error bound approximately.
    certain = float(values[m - 1])
    reach = max(abs(certain), abs(float(values[0]))) + 1.0
    safe = certain - NOISE_ERROR - ROUNDING * reach
    if safe < floor:
        ids, values = _ranked(row, state, np.flatnonzero(approximate >= safe))
    return ids[:m], values[:m]


def _best_natively(row: HalfArray, state: int, m: int) -> tuple[IntArray, FloatArray] | None:
    """As `_best`, in one pass of the kernels; None where that settles nothing."""
    library = noise_library()
    if library is None:
        return None
    noise = noise_vector(state, row.shape[0])
    found = library.candidates(row, noise, m, SLACK)
    if found is None or abs(found[1]) > LARGE:
        return None
    ids, values = _ranked(row, state, found[0])
    reach = max(abs(float(values[m - 1])), abs(float(values[0]))) + 1.0
    safe = float(values[m - 1]) - NOISE_ERROR - ROUNDING * reach  # as in `_best`
    return (ids[:m], values[:m]) if safe >= found[1] - SLACK else None


def _narrow_best(rows: HalfArray, states: Sequence[int], m: int) -> tuple[IntArray, FloatArray]:
    """Find the m <= V largest perturbed values of narrow rows [R, V], all rows at once."""
    size = rows.shape[1]
    ids = np.empty((len(rows), m), dtype=np.int64)
    values = np.empty((len(rows), m), dtype=np.float64)
    step = max(1, (1 << 20) // size)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        state = np.array(states[part], dtype=np.uint64)
        words = (vocabulary_words(size)[None, :] ^ state[:, None]).reshape(-1)
        noise = _to_gumbel(mix_array(words)).reshape(-1, size)
        perturbed = rows[part].astype(np.float64) + noise
        if m == 1:
            ids[part] = perturbed.argmax(axis=1)[:, None]  # the first maximum
        else:
            ids[part] = np.argsort(-perturbed, axis=1, kind="stable")[:, :m]
        values[part] = perturbed[np.arange(len(perturbed))[:, None], ids[part]]
    ids[values == -np.inf] = -1
    return ids, values


def _topk(shaped: Tensor, states: Sequence[int], m: int) -> tuple[IntArray, FloatArray]:
    """Find the m largest perturbed values of every row, -1 and -inf where there are fewer."""
    if shaped.ndim != 2 or shaped.shape[0] != len(states):
        raise ShapeError(
            f"shaped logits are {tuple(shaped.shape)}, but must be [{len(states)}, V], "
            "one row per key."
        )
    if m < 1:
        raise ConfigError(f"m is {m}, but must be an integer >= 1.")
    rows: HalfArray = shaped.detach().to("cpu", torch.float32).numpy()
    if len(rows) and m <= rows.shape[1] <= NARROW:
        return _narrow_best(rows, states, m)
    ids = np.full((len(rows), m), -1, dtype=np.int64)
    values = np.full((len(rows), m), -np.inf)
    width = min(m, rows.shape[1])
    if rows.shape[1] <= NARROW:
        if len(rows) and width:
            ids[:, :width], values[:, :width] = _narrow_best(rows, states, width)
        return ids, values
    for r, state in enumerate(states):
        found, value = _best(rows[r], state, width)
        ids[r, : len(found)], values[r, : len(found)] = found, value
    return ids, values


def states_of(keys: Sequence[NoiseKey], stream: Stream, *counters: Sequence[int]) -> list[int]:
    """Chain every row's key, stream and counters."""
    if any(len(c) != len(keys) for c in counters):
        lengths = [len(c) for c in counters]
        raise ShapeError(f"{len(keys)} noise keys came with counters of lengths {lengths}.")
    if not keys:
        return []
    known: dict[int, int] = {}  # rows of one request have one key object
    for key in keys:
        if id(key) not in known:
            known[id(key)] = _stream_state(key, stream)
    starts = [known[id(key)] for key in keys]
    words = [np.array(counter, dtype=np.int64) for counter in counters]
    if len(keys) <= _FEW_ROWS:
        rows = zip(*(word.tolist() for word in words), strict=True)
        return [extend(start, row) for start, row in zip(starts, rows, strict=True)]
    states = np.array(starts, dtype=np.uint64)
    for word in words:  # as `extend`, all rows at once
        states ^= token_words(word)
        mix_array(states)
    values: list[int] = states.tolist()
    return values


def _tensors(like: Tensor, found: tuple[IntArray, FloatArray]) -> tuple[Tensor, Tensor]:
    ids, values = (torch.from_numpy(x).to(like.device) for x in found)
    return ids, values


def approximate_gumbel(key: NoiseKey, positions: Sequence[int], size: int) -> list[HalfArray]:
    """Noise of the coupled rule in float32, for whoever only guesses what will be drawn.

    Args:
        key: The sample's key.
        positions: Output positions.
        size: V.

    Returns:
        float32 [V] for each position, at most 2e-5 off; shared, not to be written to.
    """
    states = [state_of(key, Stream.COUPLED, position) for position in positions]
    return noise_vectors(states, size, torch.get_num_threads())


def perturbed_argmax(
    shaped: Tensor,
    keys: Sequence[NoiseKey],
    positions: Sequence[int],
    *,
    stream: Stream = Stream.COUPLED,
) -> Tensor:
    """Draw one token per row: the largest shaped logit plus noise, the lowest id among ties.

    Args:
        shaped: float32 [R, V], -inf for removed tokens, no NaN. One copy to the host is made.
        keys: One per row.
        positions: Output position of the token each row predicts.
        stream: Whose noise to use.

    Returns:
        int64 [R], on the device of `shaped`.

    Raises:
        ShapeError: If the number of rows, keys and positions differ.
        CapabilityError: If a row has no finite logit.
    """
    ids, _ = _topk(shaped, states_of(keys, stream, positions), 1)
    if (ids < 0).any():
        row = int(np.flatnonzero(ids[:, 0] < 0)[0])
        raise CapabilityError(f"row {row} has no token with a finite logit to draw.")
    return torch.from_numpy(ids[:, 0].copy()).to(shaped.device)


def perturbed_topk(
    shaped: Tensor,
    keys: Sequence[NoiseKey],
    positions: Sequence[int],
    m: int,
    *,
    stream: Stream = Stream.COUPLED,
) -> tuple[Tensor, Tensor]:
    """Find the m >= 1 largest of shaped logits plus noise in every row, best first.

    The other arguments are those of `perturbed_argmax`.

    Returns:
        Token ids int64 [R, m] and perturbed values float64 [R, m], on the device of `shaped`. A
        row with fewer than m finite logits ends in ids -1 with value -inf.

    Raises:
        ShapeError: If the number of rows, keys and positions differ.
        ConfigError: If m is below 1.
    """
    return _tensors(shaped, _topk(shaped, states_of(keys, stream, positions), m))


def draft_topk(
    shaped: Tensor,
    keys: Sequence[NoiseKey],
    rounds: Sequence[int],
    nodes: Sequence[int],
    m: int,
) -> tuple[Tensor, Tensor]:
    """Draw m children per row without replacement for the rejection rules, in draw order.

    As `perturbed_topk`, but for the names: the round, and the parent whose children are drawn (-1
    for the anchor), per row.

    Raises:
        ShapeError: If the number of rows, keys, rounds and nodes differ.
        ConfigError: If m is below 1.
    """
    return _tensors(shaped, _topk(shaped, states_of(keys, Stream.DRAFT, rounds, nodes), m))
