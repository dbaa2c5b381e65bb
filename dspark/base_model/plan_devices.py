"""How many GPUs a model needs, and how fast bandwidth lets it decode.

Upper bounds: bytes that must move, over the bandwidth of memory or disk; no compute, no traffic
between GPUs, no activations. GB are 10^9 bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dspark.base_model.plan_parts import Kind, Tensors, WeightFormat, weight_bytes
from dspark.errors import ConfigError

__all__ = [
    "GPUS",
    "USABLE",
    "Gpu",
    "GpuPlan",
    "PagedPlan",
    "Traffic",
    "build_gpu",
    "distinct_experts",
    "plan_gpu",
    "plan_paged",
    "traffic",
]

USABLE = 0.9
"""Share of a GPU's memory left for weights and caches; the rest is for activations and the like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: Its name.
        memory: Bytes.
        bandwidth: Bytes a second between it and its memory.
    """

    name: str
    memory: float
    bandwidth: float


GPUS: dict[str, Gpu] = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu(name="H100-80GB", memory=80e9, bandwidth=3.35e12),
        Gpu(name="H200-141GB", memory=141e9, bandwidth=4.8e12),
        Gpu(name="B200-180GB", memory=180e9, bandwidth=7.7e12),
    )
}
"""By name in lower case. Source: the makers' data sheets, SXM boards."""


def build_gpu(
    name: str | None, memory_gb: float | None = None, bandwidth_gb: float | None = None
) -> Gpu:
    """Take a GPU from the table, or one of the caller's.

    Args:
        name: Key of `GPUS` in either case, or None for a GPU described by the other two.
        memory_gb: GB; None for the table's.
        bandwidth_gb: GB a second; None for the table's.

    Raises:
        ConfigError: If the name is unknown, a figure is not above 0, or one is missing.
    """
    check_above_zero("--gpu-memory", memory_gb)
    check_above_zero("--gpu-bandwidth", bandwidth_gb)
    known = GPUS.get(name.lower()) if name is not None else None
    if name is not None and known is None:
        names = ", ".join(gpu.name for gpu in GPUS.values())
        raise ConfigError(
            f"there is no GPU {name!r} in the table.",
            hint=f"one of {names}, or give --gpu-memory and --gpu-bandwidth",
        )
    if known is None and (memory_gb is None or bandwidth_gb is None):
        raise ConfigError("a GPU without --gpu needs both --gpu-memory and --gpu-bandwidth.")
    memory = memory_gb * 1e9 if memory_gb is not None else known.memory if known else 0.0
    speed = bandwidth_gb * 1e9 if bandwidth_gb is not None else known.bandwidth if known else 0.0
    is_listed = known is not None and memory_gb is None and bandwidth_gb is None
    label = known.name if known is not None else "GPU"
    title = label if is_listed else f"{label} ({memory / 1e9:g} GB, {speed / 1e9:g} GB/s)"
    return Gpu(name=title, memory=memory, bandwidth=speed)


def check_above_zero(option: str, value: float | None) -> None:
    """Refuse what is no positive finite number.

    Raises:
        ConfigError: If the value is given and is not one.
    """
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{option} is {value:g}, but must be a finite number above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of one forward for a batch of rows, one token a row.

    Attributes:
        dense: Weights that every forward reads: all but embedding, draft stages, routed experts.
        experts: Routed experts that the batch is expected to touch.
        distinct: Expected distinct experts a layer.
        cache: Cache read, all rows.
    """

    dense: int
    experts: float
    distinct: float
    cache: int

    @property
    def total(self) -> float:
        """All bytes of the forward."""
        return self.dense + self.experts + self.cache


def distinct_experts(experts: int, chosen: int, batch: int) -> float:
    """Expected distinct experts of E that N rows with k each touch: E·(1 - (1 - k/E)^N).

    Rows choose independently and uniformly. Real routing is skewed, so a batch touches fewer.
    """
    return float(experts * (1 - (1 - chosen / experts) ** batch))


def traffic(
    tensors: tuple[Tensors, ...], *, experts: int, chosen: int, batch: int, cache_read: int
) -> Traffic:
    """Bytes that one forward of a batch moves, weights as released.

    Args:
        tensors: The model's tensors.
        experts: Routed experts of a layer.
        chosen: Experts a token goes through.
        batch: Rows, >= 1.
        cache_read: Bytes of cache a row reads.
    """
    dense = [t for t in tensors if t.used > 0 and t.kind is not Kind.ROUTED]
    distinct = distinct_experts(experts, chosen, batch)
    routed = weight_bytes(tensors, WeightFormat.RELEASE)[Kind.ROUTED]
    return Traffic(
        dense=sum(weight_bytes(dense, WeightFormat.RELEASE).values()),
        experts=routed * distinct / experts,
        distinct=distinct,
        cache=batch * cache_read,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPlan:
    """What a kind of GPU makes of a model.

    Attributes:
        gpu: The GPU.
        needed: How many hold the weights and the caches of the batch.
        tokens_per_second: Upper bound over the whole batch, all GPUs' bandwidth used in full.
    """

    gpu: Gpu
    needed: int
    tokens_per_second: float


def plan_gpu(gpu: Gpu, *, resident: int, moved: Traffic, batch: int) -> GpuPlan:
    """Count GPUs for `resident` bytes, and bound the speed by what a forward moves."""
    needed = max(1, math.ceil(resident / (USABLE * gpu.memory)))
    speed = batch * needed * gpu.bandwidth / moved.total
    return GpuPlan(gpu=gpu, needed=needed, tokens_per_second=speed)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedPlan:
    """Decoding with the routed experts on disk and some of them in memory.

    Attributes:
        resident_share: Share of the routed experts that fits in memory, 0..1.
        resident_bytes: Memory in all: those experts, every other weight, the batch's caches.
        missed_bytes: Expected bytes from disk for one forward.
        tokens_per_second: Upper bound from the disk over the whole batch, None without misses.
    """

    resident_share: float
    resident_bytes: float
    missed_bytes: float
    tokens_per_second: float | None


def plan_paged(
    *,
    routed: int,
    resident: int,
    moved: Traffic,
    batch: int,
    expert_memory: float,
    disk_bandwidth: float,
) -> PagedPlan:
    """Bound the speed when experts that are not in memory come from disk.

    Uniform routing: an expert is in memory with the probability that any is, so a forward misses
    that share of what it touches. Real routing is skewed, which a cache of the frequent experts
    turns into fewer misses.

    Args:
        routed: Bytes of all routed experts.
        resident: Bytes of everything: weights and the batch's caches.
        moved: What a forward of the batch reads.
        batch: Rows.
        expert_memory: Bytes for experts.
        disk_bandwidth: Bytes a second.
    """
    share = min(1.0, expert_memory / routed)
    missed = moved.experts * (1 - share)
    return PagedPlan(
        resident_share=share,
        resident_bytes=resident - routed * (1 - share),
        missed_bytes=missed,
        tokens_per_second=batch * disk_bandwidth / missed if missed > 0 else None,
    )
