"""What a cost plan counts in: groups of tensors, cache items, terms of FLOPs.

Units: bytes are bytes (not KiB), FLOPs count a multiply-add as two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import Enum

__all__ = [
    "CacheBytes",
    "FlopTerm",
    "Kind",
    "Precision",
    "Store",
    "Tensors",
    "WeightFormat",
    "count_active",
    "count_parameters",
    "matmul_terms",
    "weight_bytes",
]


class Kind(Enum):
    """What a tensor is for."""

    EMBEDDING = "embedding and head"
    ATTENTION = "attention"
    COMPRESSOR = "compressors"
    INDEXER = "indexer"
    ROUTED = "routed experts"
    SHARED = "shared experts"
    DENSE = "dense feed-forward"
    GATE = "gates"
    HYPER = "hyper-connections"
    NORM = "norms"
    DRAFT = "draft stages"


class Store(Enum):
    """How a tensor lies in a file; the scales of a quantised one count as its bytes."""

    FP4 = "fp4"
    FP8 = "fp8"
    FP8_F32 = "fp8, float32 scales"
    BF16 = "bf16"
    F32 = "float32"
    I64 = "int64"


class WeightFormat(Enum):
    """A way to store the whole model."""

    RELEASE = "release"
    FP8 = "fp8"
    BF16 = "bf16"


class Precision(Enum):
    """Operands of a multiplication; a weight of 4 bits times an activation of 8 is FP8.

    BF16 stands for everything wider than 8 bits.
    """

    FP4 = "fp4"
    FP8 = "fp8"
    BF16 = "bf16"

    @property
    def fp8_equivalent(self) -> float:
        """FP8 FLOPs that a tensor core does in the time of one FLOP of this precision."""
        return {Precision.FP4: 0.5, Precision.FP8: 1.0, Precision.BF16: 2.0}[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """Tensors of one shape and purpose.

    Attributes:
        kind: What they are for.
        rows: Outputs of the matrix; 1 for a vector.
        cols: Inputs of the matrix.
        count: How many there are.
        active: How many of them a token uses; None for all.
        store: How the release stores them.
        precision: Operands of the product with an activation, None if there is no such product.
        is_parameter: False for tables that are not trained.
    """

    kind: Kind
    rows: int
    cols: int
    count: int = 1
    active: int | None = None
    store: Store = Store.BF16
    precision: Precision | None = None
    is_parameter: bool = True

    @property
    def used(self) -> int:
        """How many of the tensors a token uses."""
        return self.count if self.active is None else self.active

    def bytes_each(self, weight_format: WeightFormat) -> int:
        """Bytes of one tensor and its scales."""
        return _tensor_bytes(_stored(self.store, weight_format), self.rows, self.cols)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopTerm:
    """One term of the work for one token.

    Attributes:
        name: What is computed.
        flops: Floating-point operations, two a multiply-add.
        precision: Operands of the multiplications.
    """

    name: str
    flops: int
    precision: Precision

    @property
    def fp8_equivalent(self) -> float:
        """The same work in FP8 FLOPs."""
        return self.flops * self.precision.fp8_equivalent


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheBytes:
    """Bytes of one sequence's cache, by what they hold.

    Attributes:
        window: Rows of the sliding windows.
        csa_entries: Compressed entries of CSA layers.
        hca_entries: Compressed entries of HCA layers.
        indexer_keys: Keys the indexer scores.
        buffers: Raw rows of windows that are not yet, or only just, compressed.
        latents: Rows of single tokens (V3.2; none in V4).
    """

    window: int = 0
    csa_entries: int = 0
    hca_entries: int = 0
    indexer_keys: int = 0
    buffers: int = 0
    latents: int = 0

    @property
    def total(self) -> int:
        """Sum of the items."""
        return sum(getattr(self, field.name) for field in fields(self))


def count_parameters(tensors: Iterable[Tensors]) -> int:
    """Trained numbers in the tensors."""
    return sum(t.rows * t.cols * t.count for t in tensors if t.is_parameter)


def count_active(tensors: Iterable[Tensors]) -> int:
    """Trained numbers that one token goes through: chosen experts only, no embedding table."""
    return sum(t.rows * t.cols * t.used for t in tensors if t.is_parameter)


def weight_bytes(tensors: Iterable[Tensors], weight_format: WeightFormat) -> dict[Kind, int]:
    """Bytes by kind, in the order of `Kind`.

    Args:
        tensors: The tensors.
        weight_format: RELEASE as released; FP8 turns FP4 into FP8 with float32 scales a 128x128
            block (how the Base models store experts); BF16 turns FP4 and FP8 into bfloat16.
    """
    found = dict.fromkeys(Kind, 0)
    for t in tensors:
        found[t.kind] += t.count * t.bytes_each(weight_format)
    return found


def matmul_terms(tensors: Iterable[Tensors]) -> list[FlopTerm]:
    """FLOPs of the products of one token's activations with weights, by kind and precision.

    A [rows, cols] matrix takes 2·rows·cols.
    """
    found: dict[tuple[Kind, Precision], int] = {}
    for t in tensors:
        if t.precision is not None:
            key = t.kind, t.precision
            found[key] = found.get(key, 0) + 2 * t.rows * t.cols * t.used
    ordered = sorted(found.items(), key=lambda item: list(Kind).index(item[0][0]))
    return [
        FlopTerm(name=_TERM_NAMES.get(kind, kind.value), flops=flops, precision=precision)
        for (kind, precision), flops in ordered
    ]


_TERM_NAMES = {
    Kind.EMBEDDING: "head",
    Kind.ATTENTION: "attention projections",
    Kind.INDEXER: "indexer projections",
}
_BLOCK = 128  # an FP8 scale covers 128 x 128 numbers
_GROUP = 32  # an FP4 scale covers 32 numbers of a row


def _stored(store: Store, weight_format: WeightFormat) -> Store:
    is_quantised = store in (Store.FP4, Store.FP8, Store.FP8_F32)
    if weight_format is WeightFormat.BF16 and is_quantised:
        return Store.BF16
    if weight_format is WeightFormat.FP8 and store is Store.FP4:
        return Store.FP8_F32
    return store


def _tensor_bytes(store: Store, rows: int, cols: int) -> int:
    blocks = -(-rows // _BLOCK) * -(-cols // _BLOCK)
    numbers = rows * cols
    return {
        Store.FP4: rows * (-(-cols // 2) + -(-cols // _GROUP)),
        Store.FP8: numbers + blocks,
        Store.FP8_F32: numbers + 4 * blocks,
        Store.BF16: 2 * numbers,
        Store.F32: 4 * numbers,
        Store.I64: 8 * numbers,
    }[store]
