"""The cost model of DeepSeek-V4: parameters, bytes, FLOPs, GPUs, and V3.2 to compare with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dspark.base_model.config import V4Config
from dspark.base_model.plan_devices import (
    GPUS,
    Gpu,
    GpuPlan,
    PagedPlan,
    Traffic,
    check_above_zero,
    plan_gpu,
    plan_paged,
    traffic,
)
from dspark.base_model.plan_parts import (
    CacheBytes,
    FlopTerm,
    Kind,
    Tensors,
    WeightFormat,
    count_active,
    count_parameters,
    weight_bytes,
)
from dspark.base_model.plan_v3 import V32, v3_cache, v3_cache_read, v3_flops, v3_tensors
from dspark.base_model.plan_v4 import cache_bytes, v4_cache, v4_cache_read, v4_flops, v4_tensors
from dspark.base_model.presets import PRESETS, preset
from dspark.errors import CheckpointError, ConfigError

__all__ = [
    "MILLION",
    "V32_NAME",
    "Comparison",
    "ModelPlan",
    "PlanRequest",
    "cache_bytes",
    "compare",
    "plan_model",
    "plan_v32",
    "read_model",
    "weights_on_disk",
]

MILLION = 1024 * 1024
"""Tokens that "1M" means, the context that V4's report compares at."""

V32_NAME = "v3.2"

# Report section 1 and figure 1: shares of V3.2's FLOPs (in equivalent FP8 FLOPs) and cache.
_PUBLISHED = {"v4-pro": (0.27, 0.10), "v4-flash": (0.10, 0.07)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What to plan for.

    Attributes:
        context: Tokens of a sequence, the decoded one included; > 0.
        batch: Sequences decoded together, > 0.
        gpus: Kinds of GPU to count.
        expert_memory: Bytes for routed experts if they are on disk, else None.
        disk_bandwidth: Bytes a second from disk; given with `expert_memory` or not at all.

    Raises:
        ConfigError: If a figure is out of range, or one of the last two is missing.
    """

    context: int = MILLION
    batch: int = 1
    gpus: tuple[Gpu, ...] = tuple(GPUS.values())
    expert_memory: float | None = None
    disk_bandwidth: float | None = None

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ConfigError(f"--context is {self.context}, but must be at least 1 token.")
        if self.batch < 1:
            raise ConfigError(f"--batch is {self.batch}, but must be at least 1.")
        if (self.expert_memory is None) != (self.disk_bandwidth is None):
            raise ConfigError(
                "--expert-memory and --disk-bandwidth go together, but one is missing."
            )
        check_above_zero("--expert-memory", self.expert_memory)
        check_above_zero("--disk-bandwidth", self.disk_bandwidth)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """What a model costs.

    Attributes:
        name: Preset, path or "v3.2".
        max_context: Positions the model is made for.
        parameters: Trained numbers without the draft stages.
        draft_parameters: Trained numbers of the draft stages.
        active: Trained numbers a token goes through, embedding table and draft stages left out.
        weights: Bytes by kind in each format.
        cache: One sequence at the context, deployed format.
        cache_read: What one decoded token reads of it.
        own_cache: One sequence at the context in dspark's cache in bfloat16; None for V3.2.
        flops: Terms of one decoded token at the context.
        traffic: Bytes one forward of the batch moves.
        gpus: A plan for each kind of GPU asked for.
        paged: With the experts on disk, if asked for.
        disk_bytes: Size of the safetensors files of a folder, if there are any.
        published: Shares of V3.2's FLOPs and cache at 1M tokens that the report gives, if any.
    """

    name: str
    max_context: int
    parameters: int
    draft_parameters: int
    active: int
    weights: Mapping[WeightFormat, Mapping[Kind, int]]
    cache: CacheBytes
    cache_read: CacheBytes
    own_cache: CacheBytes | None
    flops: tuple[FlopTerm, ...]
    traffic: Traffic
    gpus: tuple[GpuPlan, ...]
    paged: PagedPlan | None
    disk_bytes: int | None = None
    published: tuple[float, float] | None = None

    @property
    def total_flops(self) -> int:
        """FLOPs of a token, whatever their precision."""
        return sum(term.flops for term in self.flops)

    @property
    def fp8_flops(self) -> float:
        """FP8 FLOPs of a token: bf16 counts double, FP4 times FP4 half."""
        return sum(term.fp8_equivalent for term in self.flops)

    @property
    def release_bytes(self) -> int:
        """Weights as released, draft stages included."""
        return sum(self.weights[WeightFormat.RELEASE].values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A model over V3.2 at the same context, as shares.

    Attributes:
        model: Name.
        flops: FP8-equivalent FLOPs of a token.
        flops_unweighted: FLOPs of a token, each counted once.
        cache: Bytes of a sequence's cache in the deployed formats.
        published_flops: What the report says, at 1M tokens only.
        published_cache: What the report says, at 1M tokens only.
    """

    model: str
    flops: float
    flops_unweighted: float
    cache: float
    published_flops: float | None = None
    published_cache: float | None = None


def plan_model(
    config: V4Config, request: PlanRequest, *, name: str = "", disk_bytes: int | None = None
) -> ModelPlan:
    """Cost of a V4 model.

    Args:
        config: The model.
        request: Context, batch, GPUs.
        name: What to call it.
        disk_bytes: Size of its files, if it has any.
    """
    n = request.context
    published = next((v for k, v in _PUBLISHED.items() if _same_target(config, PRESETS[k])), None)
    plan = _plan(
        request,
        tensors=v4_tensors(config),
        flops=v4_flops(config, n),
        cache=v4_cache(config, n),
        cache_read=v4_cache_read(config, n),
        experts=config.n_routed_experts,
        chosen=config.num_experts_per_tok,
    )
    return replace(
        plan,
        name=name,
        max_context=config.max_position_embeddings,
        own_cache=cache_bytes(config, n),
        disk_bytes=disk_bytes,
        published=published,
    )


def plan_v32(request: PlanRequest) -> ModelPlan:
    """Cost of DeepSeek-V3.2."""
    return _plan(
        request,
        tensors=v3_tensors(V32),
        flops=v3_flops(request.context),
        cache=v3_cache(request.context),
        cache_read=v3_cache_read(request.context),
        experts=V32.n_routed_experts,
        chosen=V32.num_experts_per_tok,
    )


def compare(plan: ModelPlan, yardstick: ModelPlan, *, context: int) -> Comparison:
    """Shares of the yardstick's FLOPs and cache, with what the report gives at 1M tokens."""
    flops, cache = plan.published if plan.published and context == MILLION else (None, None)
    return Comparison(
        model=plan.name,
        flops=plan.fp8_flops / yardstick.fp8_flops,
        flops_unweighted=plan.total_flops / yardstick.total_flops,
        cache=plan.cache.total / yardstick.cache.total,
        published_flops=flops,
        published_cache=cache,
    )


def read_model(model: str) -> tuple[V4Config, int | None]:
    """The configuration a name or path stands for, and the size of the weights beside it.

    Args:
        model: A preset, a config.json, or a folder with one.

    Raises:
        ConfigError: If it is none of them, or the configuration is not that of a V4 model.
        CheckpointError: If the config.json is missing or cannot be read.
    """
    if model in PRESETS:
        return preset(model), None
    path = Path(model)
    if model and os.path.isdir(path):
        return _read_config(path / "config.json"), weights_on_disk(path)
    if model and (os.path.exists(path) or path.suffix == ".json" or len(path.parts) > 1):
        return _read_config(path), None
    raise ConfigError(
        f"{model!r} is no preset, config.json or folder.",
        hint=f"presets: {', '.join([*PRESETS, V32_NAME])}",
    )


def weights_on_disk(folder: Path) -> int | None:
    """Bytes of the safetensors files in a folder, None if there are none."""
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return sum(sizes) if sizes else None


def _read_config(path: Path) -> V4Config:
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror}.") from exc
    except ValueError as exc:
        raise CheckpointError(f"{path} is not JSON.") from exc
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    kind = raw.get("model_type", "deepseek_v4")
    if kind != "deepseek_v4":
        raise ConfigError(f"{path} is the config of a {kind!r} model, not of deepseek_v4.")
    return V4Config.from_dict(raw)


def _same_target(one: V4Config, other: V4Config) -> bool:
    """True if two models are alike but for draft stages and how experts are stored."""
    plain: dict[str, Any] = {
        "expert_dtype": "fp4",
        "draft_stages": 0,
        "dspark_block_size": 0,
        "dspark_noise_token_id": 0,
        "dspark_target_layer_ids": (),
        "dspark_markov_rank": 0,
    }
    return replace(one, **plain) == replace(other, **plain)


def _plan(
    request: PlanRequest,
    *,
    tensors: tuple[Tensors, ...],
    flops: Sequence[FlopTerm],
    cache: CacheBytes,
    cache_read: CacheBytes,
    experts: int,
    chosen: int,
) -> ModelPlan:
    weights = {kind: weight_bytes(tensors, kind) for kind in WeightFormat}
    released = weights[WeightFormat.RELEASE]
    resident = sum(released.values()) + request.batch * cache.total
    moved = traffic(
        tensors,
        experts=experts,
        chosen=chosen,
        batch=request.batch,
        cache_read=cache_read.total,
    )
    paged = None
    if request.expert_memory is not None and request.disk_bandwidth is not None:
        paged = plan_paged(
            routed=released[Kind.ROUTED],
            resident=resident,
            moved=moved,
            batch=request.batch,
            expert_memory=request.expert_memory,
            disk_bandwidth=request.disk_bandwidth,
        )
    target = [t for t in tensors if t.kind is not Kind.DRAFT]
    drafts = [t for t in tensors if t.kind is Kind.DRAFT]
    return ModelPlan(
        name=V32_NAME,
        max_context=V32.max_position_embeddings,
        parameters=count_parameters(target),
        draft_parameters=count_parameters(drafts),
        active=count_active(tensors),
        weights=weights,
        cache=cache,
        cache_read=cache_read,
        own_cache=None,
        flops=tuple(flops),
        traffic=moved,
        gpus=tuple(
            plan_gpu(gpu, resident=resident, moved=moved, batch=request.batch)
            for gpu in request.gpus
        ),
        paged=paged,
    )
