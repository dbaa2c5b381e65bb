"""Step times of DeepSeek-V4 models on GPUs, from what a forward reads and computes.

Parts of the model run one after the other; each takes the longer of reading its bytes and computing
its FLOPs:

    seconds = fixed + sum over parts of max(bytes / bandwidth, sum over precisions of FLOPs / rate)

Bytes are weights as released, read once a forward (of the routed experts, those that the rows are
expected to wake: E (1 - (1 - k/E)^rows) a layer), and the deployed K/V, read once a request. FLOPs
are the plan's for a token at the context, times the rows. Bandwidth and rates are the makers' peak
times the number of GPUs times a stated share. Traffic between GPUs, imbalance of experts, norms,
sampling and the like are left out, or in `fixed`.

**Source:** `dspark.base_model.plan` (bytes and FLOPs); data sheets (peaks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dspark.base_model.config import V4Config
from dspark.base_model.plan_devices import GPUS, Gpu, check_above_zero
from dspark.base_model.plan_parts import (
    FlopTerm,
    Kind,
    Precision,
    Tensors,
    WeightFormat,
    matmul_terms,
    weight_bytes,
)
from dspark.base_model.plan_v4 import v4_cache_read, v4_flops, v4_tensors
from dspark.errors import ConfigError
from dspark.eval.simulate.costs import octave_of, typical_context
from dspark.tree import FloatArray, IntArray

__all__ = ["Device", "DraftRoofline", "Roofline", "build_device", "draft_config"]

_TERA = 1e12
_PEAKS: dict[str, tuple[float, float, float]] = {
    "h100-80gb": (989, 1979, 1979),
    "h200-141gb": (989, 1979, 1979),
    "b200-180gb": (2250, 4500, 9000),
}
"""Dense TFLOP/s in bfloat16, FP8 and FP4; FP4 runs in FP8 where there are no FP4 cores.

Source: the makers' data sheets, SXM boards, without sparsity.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """GPUs that work on a forward together.

    Attributes:
        gpu: Their kind.
        count: How many.
        flops: FLOP/s of one at its peak, by precision.
        bandwidth_share: Share of the peak bandwidth that is reached.
        flops_share: Share of the peak FLOP/s that is reached.
        fixed_seconds: Of a forward of the target, whatever its rows.

    Raises:
        ConfigError: If a figure is out of range.
    """

    gpu: Gpu
    count: int
    flops: Mapping[Precision, float]
    bandwidth_share: float = 0.7
    flops_share: float = 0.5
    fixed_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"--gpus is {self.count}, but must be >= 1.")
        for name, share in (
            ("--bandwidth-share", self.bandwidth_share),
            ("--flops-share", self.flops_share),
        ):
            if not 0 < share <= 1:
                raise ConfigError(f"{name} is {share:g}, but must be in (0, 1].")
        if not 0 <= self.fixed_seconds < np.inf:
            raise ConfigError(
                f"the fixed time of a step is {self.fixed_seconds} s, but must be >= 0."
            )

    @property
    def bandwidth(self) -> float:
        """Bytes a second of all of them, as reached."""
        return self.gpu.bandwidth * self.count * self.bandwidth_share

    def rate(self, precision: Precision) -> float:
        """FLOP/s of all of them, as reached."""
        return self.flops[precision] * self.count * self.flops_share


def build_device(
    gpu: Gpu,
    *,
    count: int,
    tflops: tuple[float | None, float | None, float | None] = (None, None, None),
    bandwidth_share: float = 0.7,
    flops_share: float = 0.5,
    fixed_seconds: float = 0.0,
) -> Device:
    """A device from the table, or from figures.

    Args:
        gpu: Its name in the table is what it starts with.
        count: GPUs.
        tflops: TFLOP/s in bfloat16, FP8 and FP4; None takes the table's, for FP4 of an unknown GPU
            the FP8 one.
        bandwidth_share: As in `Device`.
        flops_share: As in `Device`.
        fixed_seconds: As in `Device`.

    Raises:
        ConfigError: If a figure is out of range or not known.
    """
    for name, value in zip(("--bf16-tflops", "--fp8-tflops", "--fp4-tflops"), tflops, strict=True):
        check_above_zero(name, value)
    table: Sequence[float | None] = (None, None, None)
    for name, known in _PEAKS.items():
        if gpu.name.lower().startswith(name):
            table = known
    bf16, fp8, fp4 = (own if own is not None else k for own, k in zip(tflops, table, strict=True))
    if bf16 is None or fp8 is None:
        raise ConfigError(
            f"the FLOP/s of {gpu.name} are not in the table.",
            hint="give --bf16-tflops and --fp8-tflops, or one of "
            + ", ".join(own.name for own in GPUS.values()),
        )
    flops = {Precision.BF16: bf16 * _TERA, Precision.FP8: fp8 * _TERA}
    flops[Precision.FP4] = (fp8 if fp4 is None else fp4) * _TERA
    return Device(
        gpu=gpu,
        count=count,
        flops=flops,
        bandwidth_share=bandwidth_share,
        flops_share=flops_share,
        fixed_seconds=fixed_seconds,
    )


_ATTENTION = frozenset({Kind.ATTENTION, Kind.COMPRESSOR, Kind.INDEXER})
_ATTENTION_TERMS = (
    "attention over window",
    "attention over selection",
    "attention over HCA entries",
    "indexer scores",
)


def _seconds_each(terms: Sequence[FlopTerm], device: Device) -> float:
    """Seconds of the terms for one row."""
    return sum(term.flops / device.rate(term.precision) for term in terms)


class Roofline:
    """Seconds of a V4 forward (see the module). It is `dspark.eval.simulate.costs.Steps`.

    Args:
        config: The model; its draft stages are left out.
        device: What it runs on.
    """

    def __init__(self, config: V4Config, device: Device) -> None:
        self.config, self.device = config, device
        tensors = [t for t in v4_tensors(config) if t.used > 0]
        self._attention = [t for t in tensors if t.kind in _ATTENTION]
        self._routed = [t for t in tensors if t.kind is Kind.ROUTED]
        head = [t for t in tensors if t.kind is Kind.EMBEDDING]
        taken = {*map(id, self._attention), *map(id, self._routed), *map(id, head)}
        dense = [t for t in tensors if id(t) not in taken]
        self._plain = [self._part(head), self._part(dense)]
        products = len(matmul_terms(v4_tensors(config)))  # which come first
        other = v4_flops(config, 1)[products:]
        mixing = [t for t in other if t.name not in _ATTENTION_TERMS]
        self._plain[1] = (self._plain[1][0], self._plain[1][1] + _seconds_each(mixing, device))
        self._attention_part = self._part(self._attention)
        self._routed_part = self._part(self._routed)
        self._by_rows = np.zeros(0)  # seconds without attention
        self._contexts = np.full((2, 1), np.nan)  # by octave: see _at

    def _part(self, tensors: Sequence[Tensors]) -> tuple[float, float]:
        """Seconds to read all of the tensors, and to multiply one row with what it uses of them."""
        size = sum(weight_bytes(tensors, WeightFormat.RELEASE).values())
        return size / self.device.bandwidth, _seconds_each(matmul_terms(tensors), self.device)

    def _at(self, context: FloatArray) -> FloatArray:
        """Seconds to read a request's K/V, and of a row's attention over it: float64 [2, ...]."""
        octave = octave_of(context)
        deepest = int(octave.max(initial=0))
        if deepest >= self._contexts.shape[1]:
            more = np.full((2, deepest + 1 - self._contexts.shape[1]), np.nan)
            self._contexts = np.concatenate([self._contexts, more], axis=1)
        found = self._contexts[:, octave]
        if not np.isnan(found).any():
            return found
        for value in np.unique(octave).tolist():
            tokens = typical_context(value)
            terms = [t for t in v4_flops(self.config, tokens) if t.name in _ATTENTION_TERMS]
            read = v4_cache_read(self.config, tokens).total / self.device.bandwidth
            self._contexts[:, value] = read, _seconds_each(terms, self.device)
        return self._contexts[:, octave]

    def seconds(self, rows: IntArray, requests: IntArray, context: FloatArray) -> FloatArray:
        """Seconds of forwards; the arrays are broadcast. See `Steps`."""
        rows = np.maximum(rows, 1)
        cache, attend = self._at(context)
        read, each = self._attention_part
        attention = np.maximum(read + requests * cache, (each + attend) * rows)
        most = int(rows.max(initial=1))
        if most >= len(self._by_rows):
            self._by_rows = self._without_attention(np.arange(2 * most + 1))
        return np.asarray(self._by_rows[rows] + attention, dtype=np.float64)

    def _without_attention(self, rows: IntArray) -> FloatArray:
        """Seconds of everything that knows no context."""
        total = np.full(rows.shape, self.device.fixed_seconds)
        for read, each in self._plain:
            total += np.maximum(read, each * rows)
        read, each = self._routed_part
        share = self.config.num_experts_per_tok / self.config.n_routed_experts
        woken = 1 - (1 - share) ** rows  # expected share of a layer's experts
        return np.asarray(total + np.maximum(read * woken, each * rows), dtype=np.float64)


def draft_config(config: V4Config, stages: int) -> V4Config:
    """The draft stages as a model: window layers that share the target's head.

    Args:
        config: The target.
        stages: Blocks: 1 for MTP-1, 3 for DSpark.
    """
    return replace(
        config,
        num_hidden_layers=stages,
        compress_ratios=(0,) * stages,
        num_hash_layers=0,
        draft_stages=0,
        dspark_block_size=0,
        dspark_noise_token_id=0,
        dspark_target_layer_ids=(),
        dspark_markov_rank=0,
    )


class DraftRoofline:
    """Seconds of drafting for requests at once. It is `dspark.eval.simulate.costs.CountSeconds`.

    The stages run over `slots` rows a request, head included; their fixed time is the target's by
    number of layers. DSpark's Markov head reads its table once a drafted token.

    Args:
        config: The target.
        device: What it runs on.
        stages: Draft blocks.
        slots: Rows of a request: 1 for MTP-1, the block size for DSpark.
        markov_rank: Rank of the Markov head, 0 for none.
    """

    def __init__(
        self, config: V4Config, device: Device, *, stages: int, slots: int, markov_rank: int = 0
    ) -> None:
        fixed = device.fixed_seconds * stages / config.num_hidden_layers
        self._steps = Roofline(draft_config(config, stages), replace(device, fixed_seconds=fixed))
        self._slots = slots
        size = config.vocab_size * markov_rank
        self._table = 2 * size / device.bandwidth  # bfloat16
        self._product = 2 * size / device.rate(Precision.BF16)
        self._context = np.array(float(config.sliding_window))
        self._by_requests = np.zeros(0)

    def seconds(self, requests: IntArray) -> FloatArray:
        """Seconds for so many requests; 0 for none."""
        most = int(requests.max(initial=0))
        if most >= len(self._by_requests):
            self._by_requests = self._curve(np.arange(2 * most + 1))
        return np.asarray(self._by_requests[requests], dtype=np.float64)

    def _curve(self, requests: IntArray) -> FloatArray:
        rows = self._slots * requests
        forward = self._steps.seconds(rows, requests, self._context)
        markov = self._slots * np.maximum(self._table, self._product * requests)
        return np.where(requests > 0, forward + markov, 0.0)
