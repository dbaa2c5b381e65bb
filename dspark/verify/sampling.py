"""From logits to laws: the one place where sampling parameters act, for target and draft alike.

Order, per row: logit bias, repetition penalty, presence and frequency penalties, bad words, the
grammar's mask, temperature, top-k, min-p, top-p. Each truncation acts on the law the one before it
left.

- Repetition penalty as in transformers (Keskar et al. 2019): a token of the prompt, the output or
  the path has a positive logit divided and a negative one multiplied by it.
- Presence and frequency penalties as in OpenAI's API: count * frequency + presence is subtracted
  from a token that occurs in the output or the path; the prompt does not count.
- Bad words: the last token of a sequence is removed where the context ends with the others.
- Grammar: tokens outside the mask of the row's own path are removed (`dspark.verify.constraint`).
- Top-k keeps exactly k tokens, top-p the smallest set whose mass reaches top_p; among equal logits
  the lowest ids are kept. At temperature 0 nothing is scaled or truncated.

A row's result is a function of that row alone, to the bit: whatever is rounded (exponentials, sums)
is computed row by row, and only exact selections and IEEE operations run over several rows.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.errors import CapabilityError, ConfigError, ShapeError
from dspark.request import SamplingParams
from dspark.tree import BoolArray
from dspark.verify.likeliest import check_finite, check_matrix

__all__ = [
    "History",
    "changes_nothing",
    "has_history",
    "law_of_row",
    "laws",
    "only_scales",
    "scale_of",
    "shape_logits",
]

FloatArray = NDArray[np.float64]
HalfArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
TokenSequences = Sequence[Sequence[int]]

_BLOCK = 256  # width of the blocks whose maxima bound the k-th largest value
_CHUNK = 8192  # entries summed at a time
_GAPS = (4.0, 10.0, 3e38)  # how far below the best logit top-p looks; the last one sees all
_LEAST_TEMPERATURE = 1e-30  # keeps float32 division from underflowing its divisor


@dataclass(frozen=True, slots=True)
class History:
    """The tokens before a row, apart from its path in the tree.

    Attributes:
        prompt: Prompt token ids.
        output: Token ids generated so far, the anchor included.
    """

    prompt: Sequence[int] = ()
    output: Sequence[int] = ()

    def ends_with(self, path: Sequence[int], suffix: Sequence[int]) -> bool:
        """Tell whether prompt, output and path together end with `suffix`."""
        need = len(suffix)
        tail: list[int] = []
        for part in (path, self.output, self.prompt):
            missing = need - len(tail)
            if missing <= 0:
                break
            tail = [int(t) for t in part[max(0, len(part) - missing) :]] + tail
        return tail == [int(t) for t in suffix]


def has_history(params: SamplingParams, bad_words: TokenSequences = ()) -> bool:
    """Tell whether a row's law depends on the tokens before it through its processors."""
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or bool(params.bad_words)
        or len(bad_words) > 0
    )


def _edits(params: SamplingParams) -> bool:
    return bool(params.logit_bias) or has_history(params)


def _scales(params: SamplingParams) -> bool:
    return params.temperature not in (0, 1)


def _truncates(params: SamplingParams) -> bool:
    return params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)


def shape_logits(
    logits: Tensor,
    params: Sequence[SamplingParams],
    histories: Sequence[History] | None = None,
    paths: Sequence[Sequence[int]] | None = None,
    bad_words: Sequence[TokenSequences] | None = None,
    masks: Sequence[BoolArray | None] | None = None,
) -> Tensor:
    """Apply every row's sampling parameters to its logits.

    Args:
        logits: float [R, V] of any floating dtype; not modified.
        params: One per row.
        histories: One per row; needed by penalties and bad words only.
        paths: Tokens of the tree path that each row sees after its history, its own token
            included; empty if None.
        bad_words: Token sequences that must not appear, per row; none if None.
        masks: bool [V], the tokens that a grammar allows, per row; None for all.

    Returns:
        float32 [R, V], -inf for removed tokens; at least one token of every row is left. It may
        be `logits` itself where there was nothing to do.

    Raises:
        ShapeError: If `logits` is not a matrix or an argument does not have one entry per row.
        CapabilityError: If logits are NaN or +inf, or no token of a row can be drawn.
        ConfigError: If a token id in the bias or bad words is outside the vocabulary.
    """
    _check_rows(logits, params, histories, paths, bad_words, masks)
    shaped = logits.to(torch.float32)
    if shaped.shape[0] == 0:
        return shaped
    check_finite(shaped)
    runs = list(_runs(params))
    edits = _edited_rows(params, runs, bad_words)
    masked = [(r, mask) for r, mask in enumerate(masks or ()) if mask is not None]
    changes = any(_scales(params[r]) or _truncates(params[r]) for r, _ in runs)
    if not (edits or masked or changes):
        return shaped
    if shaped.data_ptr() == logits.data_ptr():
        shaped = shaped.clone()
    counts: dict[int, _Counts] = {}
    for r in edits:
        history = histories[r] if histories else History()
        if id(history) not in counts:
            counts[id(history)] = _Counts(history)
        path = paths[r] if paths else ()
        _edit(shaped[r], params[r], counts[id(history)], path, bad_words[r] if bad_words else ())
    for r, mask in masked:
        _keep_allowed(shaped[r], mask)
    for start, stop in runs:
        if _scales(params[start]) or _truncates(params[start]):
            _scale_and_truncate(shaped[start:stop], params[start])
    return shaped


def changes_nothing(params: SamplingParams, bad_words: TokenSequences = ()) -> bool:
    """Tell whether `shape_logits` would leave a row without a mask as it is."""
    is_shaped = _scales(params) or _truncates(params)
    return not (is_shaped or _edits(params) or len(bad_words) > 0)


def _edited_rows(
    params: Sequence[SamplingParams],
    runs: Sequence[tuple[int, int]],
    bad_words: Sequence[TokenSequences] | None,
) -> list[int]:
    """Rows with a bias, a penalty or bad words."""
    if bad_words is not None:
        return [r for r, p in enumerate(params) if _edits(p) or bad_words[r]]
    edited = [run for run in runs if _edits(params[run[0]])]
    return [r for start, stop in edited for r in range(start, stop)]


def only_scales(params: SamplingParams) -> bool:
    """True if a temperature is all that `shape_logits` would apply."""
    return not (_edits(params) or has_history(params) or _truncates(params))


def scale_of(params: SamplingParams) -> float:
    """What logits are divided by; 1 for greedy decoding."""
    return max(params.temperature, _LEAST_TEMPERATURE) if _scales(params) else 1.0


def _check_rows(logits: Tensor, *per_row: Sequence[object] | None) -> None:
    check_matrix(logits)
    for values in per_row:
        if values is not None and len(values) != logits.shape[0]:
            raise ShapeError(
                f"{logits.shape[0]} rows of logits came with {len(values)} parameters, histories, "
                "paths, bad-word lists or masks, but every row needs one."
            )


def _runs(params: Sequence[SamplingParams]) -> Iterator[tuple[int, int]]:
    """Give [start, stop) of the runs of rows that share one parameter object."""
    start = 0
    for _, run in groupby(params, key=id):
        stop = start + sum(1 for _ in run)
        yield start, stop
        start = stop


class _Counts:
    """Which tokens a history holds, counted when first asked for."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._seen: IntArray | None = None
        self._output: tuple[IntArray, IntArray] | None = None

    def seen(self, path: Sequence[int]) -> IntArray:
        """Distinct tokens of prompt, output and path, ascending."""
        if self._seen is None:
            parts = (self.history.prompt, self.history.output)
            self._seen = np.unique(np.concatenate([np.asarray(p, dtype=np.int64) for p in parts]))
        return np.union1d(self._seen, np.asarray(path, dtype=np.int64)) if path else self._seen

    def output(self, path: Sequence[int]) -> tuple[IntArray, IntArray]:
        """Distinct tokens of output and path, ascending, and how often each occurs."""
        if self._output is None:
            tokens = np.asarray(self.history.output, dtype=np.int64)
            self._output = np.unique(tokens, return_counts=True)
        ids, counts = self._output
        if not path:
            return ids, counts
        extra = np.asarray(path, dtype=np.int64)
        ids, where = np.unique(np.concatenate([ids, extra]), return_inverse=True)
        total = np.zeros(len(ids), dtype=np.int64)
        np.add.at(total, where, np.concatenate([counts, np.ones_like(extra)]))
        return ids, total


def _edit(
    row: Tensor,
    params: SamplingParams,
    counts: _Counts,
    path: Sequence[int],
    bad_words: TokenSequences,
) -> None:
    """Apply bias, penalties and bad words to one row [V] in place."""
    size = row.shape[0]
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias.keys()), device=row.device)
        _check_ids(list(params.logit_bias.keys()), size, "logit_bias")
        row[ids] += torch.tensor(
            list(params.logit_bias.values()), dtype=row.dtype, device=row.device
        )
    if params.repetition_penalty != 1:
        # Ids past the vocabulary (placeholders of other modalities) have no logit to change.
        seen = counts.seen(path)
        ids = torch.from_numpy(seen[seen < size]).to(row.device)
        values = row[ids]
        penalty = params.repetition_penalty
        row[ids] = torch.where(values < 0, values * penalty, values / penalty)
    if params.presence_penalty != 0 or params.frequency_penalty != 0:
        tokens, times = counts.output(path)
        inside = tokens < size
        cost = times[inside] * params.frequency_penalty + params.presence_penalty
        ids = torch.from_numpy(tokens[inside]).to(row.device)
        row[ids] -= torch.from_numpy(cost).to(row.device, row.dtype)
    for sequence in bad_words:
        _check_ids(sequence, size, "bad_words")
        if len(sequence) and counts.history.ends_with(path, sequence[:-1]):
            row[sequence[-1]] = -math.inf
    top = float(row.max())
    if not math.isfinite(top):
        raise CapabilityError(
            f"the largest logit after bias, penalties and bad words is {top}, so no token can "
            "be drawn; at least one token of the vocabulary must stay allowed.",
            hint="shorten bad_words or raise the logit_bias",
        )


def _keep_allowed(row: Tensor, mask: BoolArray) -> None:
    """Remove what a mask [V] does not allow from one row [V] in place."""
    if len(mask) != row.shape[0]:
        raise ShapeError(f"a mask has width {len(mask)}, but the logits have {row.shape[0]}.")
    if row.device.type == "cpu":
        host: HalfArray = row.detach().numpy()
        host[~mask] = -np.inf
        best = float(host.max())
    else:
        row.masked_fill_(torch.from_numpy(~mask).to(row.device), -math.inf)
        best = float(row.max())
    if best == -math.inf:
        raise CapabilityError(
            "the grammar and the other parameters leave no token that could come next.",
            hint="check the grammar for a dead end, and bad_words and logit_bias against it",
        )


def _check_ids(ids: Sequence[int], size: int, name: str) -> None:
    for token in ids:
        if not 0 <= token < size:
            raise ConfigError(f"{name} names token {token}, but must be from 0 to {size - 1}.")


def _scale_and_truncate(block: Tensor, params: SamplingParams) -> None:
    """Apply temperature, top-k, min-p and top-p to rows [n, V] of one request in place.

    Truncation works in host memory; rows elsewhere are copied there and back.
    """
    if _scales(params):
        # Relative to the best token, so that no temperature overflows.
        best = block.amax(dim=1, keepdim=True)
        block.sub_(best).div_(scale_of(params))
    if not _truncates(params):
        return
    host = block.to("cpu")
    for row in host.numpy():
        _truncate(row, params)
    if host.data_ptr() != block.data_ptr():
        block.copy_(host)


def _truncate(row: HalfArray, params: SamplingParams) -> None:
    """Apply top-k, min-p and top-p to one row [V] in place."""
    if 0 < params.top_k < len(row):
        _keep_best(row, params.top_k, _kth_largest(row, params.top_k))
    if params.min_p > 0:
        row[row < row.max() + np.float32(math.log(params.min_p))] = -np.inf
    if params.top_p < 1:
        is_cut = params.top_k > 0 or params.min_p > 0
        _keep_best(row, *_nucleus(row[row > -np.inf] if is_cut else row, params.top_p))


def _keep_best(row: HalfArray, count: int, threshold: np.float32) -> None:
    """Remove all but the `count` largest of a row [V], the least of which is `threshold`."""
    if threshold == -np.inf:
        return
    kept = np.flatnonzero(row >= threshold)
    values = row[kept]
    spare = len(kept) - count
    if spare > 0:
        ties = np.flatnonzero(values == threshold)
        keep = np.ones(len(kept), dtype=bool)
        keep[ties[len(ties) - spare :]] = False
        kept, values = kept[keep], values[keep]
    row.fill(-np.inf)
    row[kept] = values


def _kth_largest(row: HalfArray, k: int) -> np.float32:
    """Give the k-th largest value of a row [V], 1 <= k <= V."""
    blocks = len(row) // _BLOCK
    if k * 2 <= blocks:
        # At least k values reach the k-th largest block maximum, and few others do.
        tops = row[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        row = row[row >= np.partition(tops, -k)[-k]]
    value: np.float32 = np.partition(row, -k)[-k]
    return value


def _nucleus(row: HalfArray, top_p: float) -> tuple[int, np.float32]:
    """Find how many tokens of a row [V] reach top_p, in (0, 1), and the least logit among them.

    Only logits within a gap of the best are sorted; the gap grows until they hold enough mass.
    """
    best = row.max()
    total = 0.0
    for gap in _GAPS:
        top = np.sort(row[row >= best - np.float32(gap)])[::-1]
        mass = np.cumsum(np.exp(top.astype(np.float64) - float(best)))
        total = total or _mass(row, float(best))
        if mass[-1] >= top_p * total:
            break
    count = min(int(np.searchsorted(mass, top_p * total)) + 1, len(top))
    return count, top[count - 1]


def _mass(row: HalfArray, best: float) -> float:
    """Sum exp(logit - best) over a row [V] in float64, a cacheful at a time."""
    total = 0.0
    for start in range(0, len(row), _CHUNK):
        part = row[start : start + _CHUNK].astype(np.float64)
        part -= best
        total += float(np.exp(part, out=part).sum())
    return total


def law_of_row(row: HalfArray, *, is_greedy: bool) -> FloatArray:
    """Turn one row of shaped logits into a law.

    Args:
        row: float32 [V], -inf for removed tokens, at least one finite.
        is_greedy: True for temperature 0: all mass on the largest, the lowest id among ties.

    Returns:
        float64 [V], sums to 1.
    """
    if is_greedy:
        law = np.zeros(row.shape[0], dtype=np.float64)
        law[int(row.argmax())] = 1.0
        return law
    law = row.astype(np.float64)
    law -= law.max()
    np.exp(law, out=law)
    law /= law.sum()
    return law


def laws(shaped: Tensor, params: Sequence[SamplingParams] | None = None) -> Tensor:
    """Turn shaped logits into the laws that tokens are drawn from.

    Args:
        shaped: float32 [R, V] from `shape_logits`.
        params: One per row, for rows at temperature 0; None if there are none.

    Returns:
        float64 [R, V] on the device of `shaped`: the softmax, one-hot at temperature 0.

    Raises:
        ShapeError: If the number of rows and parameters differ.
    """
    _check_rows(shaped, params)
    host: HalfArray = shaped.detach().to("cpu", torch.float32).numpy()
    out = np.empty(host.shape, dtype=np.float64)
    for r, row in enumerate(host):
        out[r] = law_of_row(row, is_greedy=params is not None and params[r].temperature == 0)
    return torch.from_numpy(out).to(shaped.device)
