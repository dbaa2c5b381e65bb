"""Target protocol: all that the core knows of a model.

One forward takes a FLATTENED ragged batch: prefill chunks, plain decode steps, chains and trees are
all rows of the same form, without padding. Shapes: N rows of the batch, M rows whose logits are
asked for, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dspark.errors import ShapeError

if TYPE_CHECKING:
    import torch

    from dspark.cache import Cache

__all__ = [
    "BatchPart",
    "ExactnessReport",
    "HeadRows",
    "Largest",
    "RowSpan",
    "SharesHead",
    "SharesHeadRows",
    "Target",
    "TargetInfo",
    "TargetOutput",
    "TokenBatch",
]

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowSpan:
    """The rows of one slot: batch[start:stop].

    Attributes:
        slot: The slot in the cache.
        start: First row.
        stop: One past the last row.
        is_chain: True if every row's parent is the row before it.
    """

    slot: int
    start: int
    stop: int
    is_chain: bool


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The ragged batch of one forward.

    Rows of one slot are contiguous and topologically ordered (a parent before its children).

    Attributes:
        token_ids: int64 [N].
        positions: int64 [N], absolute position in the request.
        parent: int64 [N], index of the parent row within the batch, -1 for a row that follows the
            slot's committed context.
        spans: One per slot, in row order.
        output_rows: int64 [M], rows whose logits are asked for, ascending.
    """

    token_ids: IntArray
    positions: IntArray
    parent: IntArray
    spans: tuple[RowSpan, ...]
    output_rows: IntArray

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self.token_ids.shape[0])

    @staticmethod
    def build(parts: Sequence[BatchPart]) -> TokenBatch:
        """Flatten one part per slot into a batch.

        Args:
            parts: The rows of every slot that takes part.

        Returns:
            The batch; `output_rows` lists, part by part, the rows each part asked for.

        Raises:
            ShapeError: If a part is empty or its arrays differ in length.
        """
        sizes = [len(part.token_ids) for part in parts]
        for part, n in zip(parts, sizes, strict=True):
            if n == 0 or len(part.parent) != n or len(part.positions) != n:
                raise ShapeError(
                    f"a batch part of slot {part.slot} has {n} tokens, {len(part.positions)} "
                    f"positions and {len(part.parent)} parents, but needs equal lengths >= 1."
                )
        if len(parts) == 1:
            return _batch_of(parts[0])
        ends = list(accumulate(sizes))
        starts = np.array([0, *ends[:-1]], dtype=np.int64)[: len(parts)]
        local = _joined([part.parent for part in parts])
        first = starts.repeat(sizes)
        parent = local + first
        parent[local < 0] = -1
        # In a chain every row follows the one before it; only the first follows the context.
        follows = local == np.arange(-1, len(local) - 1) - first
        chains = np.logical_and.reduceat(follows, starts).tolist() if parts else []
        shift = starts.repeat([len(part.output_rows) for part in parts])
        return TokenBatch(
            _joined([part.token_ids for part in parts]),
            _joined([part.positions for part in parts]),
            parent,
            tuple(
                RowSpan(part.slot, end - n, end, is_chain)
                for part, n, end, is_chain in zip(parts, sizes, ends, chains, strict=True)
            ),
            _joined([part.output_rows for part in parts]) + shift,
        )


def _batch_of(part: BatchPart) -> TokenBatch:
    """The batch of one part, as `TokenBatch.build` makes it."""
    arrays = (part.token_ids, part.positions, part.parent, part.output_rows)
    tokens, positions, parent, outputs = (np.asarray(a, dtype=np.int64) for a in arrays)
    n = len(tokens)
    parents = parent.tolist()
    is_chain = parents == list(range(-1, n - 1))
    if not is_chain and min(parents) < -1:
        parent = np.maximum(parent, -1)
    return TokenBatch(tokens, positions, parent, (RowSpan(part.slot, 0, n, is_chain),), outputs)


def _joined(vectors: Sequence[Sequence[int] | IntArray]) -> IntArray:
    """Vectors end to end, int64."""
    arrays = [np.asarray(vector, dtype=np.int64) for vector in vectors]
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class BatchPart:
    """The rows one slot adds to a batch.

    Attributes:
        slot: The slot in the cache.
        token_ids: Tokens, topologically ordered.
        positions: Absolute positions.
        parent: Parent index within this part, -1 for rows after the committed context.
        output_rows: Rows of this part whose logits are wanted, ascending.
    """

    slot: int
    token_ids: Sequence[int] | IntArray
    positions: Sequence[int] | IntArray
    parent: Sequence[int] | IntArray
    output_rows: Sequence[int] | IntArray

    @staticmethod
    def chain(
        slot: int, token_ids: Sequence[int] | IntArray, start: int, *, want_last: bool
    ) -> BatchPart:
        """A run of tokens from position `start`, logits of the last one or of none."""
        n = len(token_ids)
        return BatchPart(
            slot,
            token_ids,
            np.arange(start, start + n),
            np.arange(-1, n - 1),
            [n - 1] if want_last else [],
        )


@dataclass(frozen=True, slots=True)
class Largest:
    """Where the largest logit of every row is.

    Attributes:
        tokens: int64 [M], the lowest id among equals; -1 where none is finite or one is NaN.
        logits: The tensor that this was found in. Whoever changes it in place must drop this.
    """

    tokens: IntArray
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """What a forward returns.

    Attributes:
        logits: [M, V] for the rows asked for, final soft-cap applied, rounded to the model's dtype;
            in it or in float32, in which they are judged.
        hidden: Captured hidden states {layer: [N, D]}; layer k is the OUTPUT of decoder layer k,
            -1 the embeddings, and the number of layers (one past the last) what the output head
            gets: the last layer's output behind the final norm. Nobody writes to them afterwards:
            they are read when a drafter wants them, which may be rounds later.
        largest: Where the forward found the largest of every row, None if it did not look.
    """

    logits: torch.Tensor
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    largest: Largest | None = None

    @property
    def tops(self) -> IntArray | None:
        """What `largest` says, if it speaks of these logits: not of what others were made from."""
        found = self.largest
        return found.tokens if found is not None and found.logits is self.logits else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactnessReport:
    """What the probe at load found (docs/losslessness.md, "Exact mode").

    Attributes:
        enabled: Exact mode is on.
        holds: The end-to-end check found a tree's rows bitwise equal to the same paths run alone.
        min_rows: Fewest rows that a linear layer is ever run with.
        max_nodes: Drafted nodes of a request that exact mode is checked for, None for any number.
        backend: The kernels in use for linear layers.
        cost: Time of a one-row step in exact mode over that of a one-row step without, minus 1;
            None if it was not measured.
        reason: One sentence: why exact mode is on or off.
    """

    enabled: bool
    holds: bool
    min_rows: int
    max_nodes: int | None = None
    backend: str
    cost: float | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetInfo:
    """Facts about a loaded model.

    Attributes:
        name: What the user called it.
        family: Adapter family: llama, qwen, gemma, ...
        vocab_size: V, the width of the logits.
        hidden_size: D.
        num_layers: Decoder layers.
        max_positions: Longest context, in tokens.
        eos_token_ids: Tokens that end a text.
        dtype: Weight dtype as text, "float32" or "bfloat16".
        device: Device as text.
        can_verify_trees: False for targets that only decode plainly.
        quant: What the weights were rounded to as they were loaded: "none", "int8" or "int4".
    """

    name: str
    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    can_verify_trees: bool = True
    quant: str = "none"


@runtime_checkable
class Target(Protocol):
    """A causal language model that scores ragged batches of trees."""

    @property
    def info(self) -> TargetInfo:
        """Facts about the model."""
        ...

    @property
    def exactness(self) -> ExactnessReport:
        """What the probe at load found."""
        ...

    def new_cache(self, *, memory_limit: int | None = None) -> Cache:
        """Make an empty cache.

        Args:
            memory_limit: Bytes of K/V that it may hold, None for no limit.

        Returns:
            The cache.
        """
        ...

    def forward(
        self, batch: TokenBatch, cache: Cache, *, capture: Sequence[int] = ()
    ) -> TargetOutput:
        """Run one ragged batch; its rows stay uncommitted in the cache.

        Args:
            batch: The rows; every slot must have been opened and reserved.
            cache: A cache made by this target.
            capture: Layers whose hidden states are wanted; see `TargetOutput.hidden`.

        Returns:
            Logits of `batch.output_rows`, and the captured hidden states.
        """
        ...


@runtime_checkable
class SharesHead(Protocol):
    """A target whose embedding and output head a draft may use."""

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embed tokens as the target's first layer gets them, Gemma's scale included.

        Args:
            token_ids: int64 [n].

        Returns:
            [n, D], in the model's dtype.
        """
        ...

    def unembed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states that have passed a final norm (the draft's own).

        Args:
            hidden: [n, D].

        Returns:
            [n, V]: the output head and the final soft-cap, but not the target's final norm.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class HeadRows:
    """Rows of an output head as plain tensors, which gradients flow through.

    Attributes:
        weight: [n, D], in the model's dtype.
        bias: [n], None without one.
        softcap: Logits become softcap * tanh(logits / softcap); None leaves them.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None


@runtime_checkable
class SharesHeadRows(SharesHead, Protocol):
    """A target that gives rows of its output head away.

    Drafts with a reduced vocabulary and no head of their own need it, and so does training: what
    `unembed` computes with may be packed for inference.
    """

    def head_rows(self, ids: torch.Tensor | None = None) -> HeadRows:
        """Rows of the output head, for keeping.

        Args:
            ids: int64 [n], tokens wanted; None for all.

        Returns:
            The rows, in the order of `ids`.
        """
        ...
