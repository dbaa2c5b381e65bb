"""`dspark plan`: what a DeepSeek-V4 model needs, from its configuration alone."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark.errors import ConfigError

if TYPE_CHECKING:
    from dspark.base_model.plan import Comparison, ModelPlan, PlanRequest
    from dspark.base_model.plan_parts import CacheBytes

__all__ = ["parse_tokens", "plan"]

_UNITS = {"": 1, "K": 1024, "M": 1024 * 1024}
_SIDE_BY_SIDE = ("v4-flash", "v4-pro")


def plan(  # noqa: PLR0913 - one parameter per option is how Typer works
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A preset, a config.json, a folder with one, or v3.2."
        ),
    ],
    context: Annotated[
        str, typer.Option("--context", help="Tokens of a sequence: 4096, 64K, 1M.")
    ] = "1M",
    batch: Annotated[int, typer.Option("--batch", help="Sequences decoded together.")] = 1,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="H100-80GB, H200-141GB, B200-180GB (default: all).")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option("--gpu-memory", help="GB of a GPU of yours.")
    ] = None,
    gpu_bandwidth: Annotated[
        float | None, typer.Option("--gpu-bandwidth", help="Its memory's GB a second.")
    ] = None,
    expert_memory: Annotated[
        float | None,
        typer.Option("--expert-memory", help="Experts on disk: GB of memory that hold some."),
    ] = None,
    disk_bandwidth: Annotated[
        float | None, typer.Option("--disk-bandwidth", help="Experts on disk: GB a second.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a DeepSeek-V4 model needs: parameters, memory, FLOPs, GPUs.

    A preset is shown beside V4-Flash, V4-Pro and V3.2. Nothing is loaded.
    """
    from dspark.base_model.plan import PlanRequest, compare, plan_v32
    from dspark.base_model.plan_devices import GPUS, build_gpu

    is_table = gpu is None and gpu_memory is None and gpu_bandwidth is None
    gpus = tuple(GPUS.values()) if is_table else (build_gpu(gpu, gpu_memory, gpu_bandwidth),)
    request = PlanRequest(
        context=parse_tokens(context),
        batch=batch,
        gpus=gpus,
        expert_memory=None if expert_memory is None else expert_memory * 1e9,
        disk_bandwidth=None if disk_bandwidth is None else disk_bandwidth * 1e9,
    )
    plans = _plans(model, request)
    yardstick = plan_v32(request)
    ratios = [compare(x, yardstick, context=request.context) for x in plans]
    if as_json:
        print(json.dumps(_record(request, plans, ratios), allow_nan=False))
        return
    from dspark.commands.plan_table import print_plain, print_table

    show = print_table if sys.stdout.isatty() else print_plain
    show(request, plans, ratios)


def parse_tokens(text: str) -> int:
    """Read a number of tokens: digits, with K for 1024 or M for 1048576.

    Raises:
        ConfigError: If the text is anything else, or 0.
    """
    found = re.fullmatch(r"([0-9]{1,12})([KM]?)", text.strip().upper())
    tokens = int(found[1]) * _UNITS[found[2]] if found else 0
    if tokens < 1:
        raise ConfigError(f"--context is {text!r}, but must be a number of tokens: 4096, 64K, 1M.")
    return tokens


def _plans(model: str, request: PlanRequest) -> list[ModelPlan]:
    """The model asked for; beside a preset, the other released models."""
    from dspark.base_model.plan import V32_NAME, plan_model, plan_v32, read_model
    from dspark.base_model.presets import PRESETS

    found = []
    if model != V32_NAME:
        config, size = read_model(model)
        found.append(plan_model(config, request, name=model, disk_bytes=size))
    if model == V32_NAME or model in PRESETS:
        others = [name for name in _SIDE_BY_SIDE if name != model]
        found += [plan_model(PRESETS[name], request, name=name) for name in others]
        found.insert(0 if model == V32_NAME else len(found), plan_v32(request))
    return found


def _record(
    request: PlanRequest, plans: list[ModelPlan], ratios: list[Comparison]
) -> dict[str, Any]:
    from dspark.base_model.plan_devices import USABLE

    return {
        "schema": 1,
        "context": request.context,
        "batch": request.batch,
        "usable_gpu_memory": USABLE,
        "routing": "uniform",
        "models": [_model_record(plan) for plan in plans],
        "against_v3.2": [asdict(ratio) for ratio in ratios],
    }


def _model_record(plan: ModelPlan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "max_context": plan.max_context,
        "parameters": {
            "total": plan.parameters,
            "active": plan.active,
            "draft_stages": plan.draft_parameters,
        },
        "weight_bytes": {
            weight_format.value: {
                "total": sum(kinds.values()),
                **{kind.value: size for kind, size in kinds.items()},
            }
            for weight_format, kinds in plan.weights.items()
        },
        "disk_bytes": plan.disk_bytes,
        "cache_bytes": {
            "deployed": _cache_record(plan.cache),
            "deployed_read_per_token": _cache_record(plan.cache_read),
            "dspark_bf16": _cache_record(plan.own_cache) if plan.own_cache else None,
        },
        "flops": {
            "total": plan.total_flops,
            "fp8_equivalent": plan.fp8_flops,
            "terms": [
                {"name": term.name, "flops": term.flops, "precision": term.precision.value}
                for term in plan.flops
            ],
        },
        "forward_bytes": {**asdict(plan.traffic), "total": plan.traffic.total},
        "gpus": [
            {
                **asdict(found.gpu),
                "needed": found.needed,
                "tokens_per_second": found.tokens_per_second,
            }
            for found in plan.gpus
        ],
        "experts_on_disk": asdict(plan.paged) if plan.paged else None,
    }


def _cache_record(cache: CacheBytes) -> dict[str, int]:
    return {**asdict(cache), "total": cache.total}
