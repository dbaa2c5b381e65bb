"""The tables of `dspark plan`: one column a model, on a terminal or tab-separated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console

    from dspark.base_model.plan import Comparison, ModelPlan, PlanRequest
    from dspark.base_model.plan_parts import CacheBytes

__all__ = ["print_plain", "print_table"]

_WIDE = 110  # columns from which the table says how a figure is made

_Models: TypeAlias = "Sequence[ModelPlan]"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A line: a label, a cell a model, how the figure is made, whether it is a sum."""

    label: str
    cells: tuple[str, ...]
    note: str = ""
    is_sum: bool = False


def print_plain(request: PlanRequest, plans: _Models, ratios: Sequence[Comparison]) -> None:
    """Print section, label and cells, separated by tabs."""
    print("\t".join((f"{request.context} tokens", "", *(_title(plan) for plan in plans))))
    for title, rows in _sections(request, plans, ratios):
        for row in rows:
            print("\t".join((title, row.label, *row.cells)))


def print_table(
    request: PlanRequest,
    plans: _Models,
    ratios: Sequence[Comparison],
    console: Console | None = None,
) -> None:
    """Print the table, with the formulas where the terminal is wide enough."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    is_wide = console.width >= _WIDE
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(f"{request.context:,} tokens", no_wrap=True, header_style="dim")
    for plan in plans:
        table.add_column(Text(_title(plan)), justify="right", overflow="fold")
    if is_wide:
        table.add_column("", style="dim")
    for index, (title, rows) in enumerate(_sections(request, plans, ratios)):
        if index:
            table.add_row()
        table.add_row(Text(title, style="bold cyan"))
        for row in rows:
            cells = [Text(f"  {row.label}"), *(Text(cell) for cell in row.cells)]
            notes = [Text(row.note)] if is_wide else []
            table.add_row(*cells, *notes, style="bold" if row.is_sum else None)
    console.print(table)
    for line in _footnotes(request, plans):
        console.print(Text(line, style="dim"))


def _sections(
    request: PlanRequest, plans: _Models, ratios: Sequence[Comparison]
) -> Iterator[tuple[str, list[_Row]]]:
    yield "parameters", _parameters(plans)
    yield "weights, as released", _weights(plans)
    yield "cache of a sequence", _cache(plans)
    yield "FLOPs of one token", _flops(plans)
    yield "share of V3.2", _shares(ratios)
    yield f"upper bounds, batch {request.batch:,}", _speed(plans)


def _title(plan: ModelPlan) -> str:
    """A preset's name, or the last part of a path."""
    return Path(plan.name).name or plan.name


def _row(
    label: str,
    plans: _Models,
    cell: Callable[[ModelPlan], str],
    *,
    note: str = "",
    is_sum: bool = False,
) -> _Row:
    return _Row(label=label, cells=tuple(map(cell, plans)), note=note, is_sum=is_sum)


def _parameters(plans: _Models) -> list[_Row]:
    return [
        _row("total", plans, lambda p: _parameter_count(p.parameters), note="without draft stages"),
        _row(
            "active",
            plans,
            lambda p: _parameter_count(p.active),
            note="without the embedding table",
        ),
        _row("draft stages", plans, lambda p: _parameter_count(p.draft_parameters)),
    ]


def _weights(plans: _Models) -> list[_Row]:
    from dspark.base_model.plan_parts import Kind, WeightFormat

    rows = []
    for kind in Kind:
        sizes = [plan.weights[WeightFormat.RELEASE][kind] for plan in plans]
        if any(sizes):
            rows.append(_Row(label=kind.value, cells=tuple(map(_bytes, sizes))))
    notes = {
        WeightFormat.RELEASE: "V4: experts FP4, matrices FP8",
        WeightFormat.FP8: "experts in FP8 too",
        WeightFormat.BF16: "nothing quantised",
    }
    for weight_format, note in notes.items():
        cells = tuple(_bytes(sum(plan.weights[weight_format].values())) for plan in plans)
        label = "all" if weight_format is WeightFormat.RELEASE else f"all in {weight_format.value}"
        is_sum = weight_format is WeightFormat.RELEASE
        rows.append(_Row(label=label, cells=cells, note=note, is_sum=is_sum))
    if any(plan.disk_bytes is not None for plan in plans):
        rows.append(_row("on disk", plans, lambda p: _bytes(p.disk_bytes or 0)))
    return rows


def _cache(plans: _Models) -> list[_Row]:
    items = {
        "window": "min(n, window) rows a layer",
        "csa_entries": "n/4 entries a CSA layer",
        "hca_entries": "n/m entries an HCA layer, m = 128",
        "latents": "n rows a layer",
        "indexer_keys": "V4: n/4 FP4 keys; V3.2: n FP8 keys",
        "buffers": "float32 rows not yet compressed",
    }
    rows = []
    for name, note in items.items():
        sizes = [_item(plan.cache, name) for plan in plans]
        if any(sizes):
            label = name.replace("_", " ").replace("csa", "CSA").replace("hca", "HCA")
            rows.append(_Row(label=label, cells=tuple(map(_bytes, sizes)), note=note))
    return [
        *rows,
        _row("all, as deployed", plans, lambda p: _bytes(p.cache.total), is_sum=True),
        _row("all, in dspark, bf16", plans, _own_cache, note="nothing quantised"),
    ]


def _item(cache: CacheBytes, name: str) -> int:
    size: int = getattr(cache, name)
    return size


def _own_cache(plan: ModelPlan) -> str:
    return _bytes(plan.own_cache.total) if plan.own_cache else "-"


# Every term, in the order of the table, and how it is made.
_TERM_NOTES = {
    "attention projections": "2 a weight",
    "attention over window": "4·H·c·min(n, window) a layer",
    "attention over selection": "V4: 4·H·c·min(top-k, n/4) a layer",
    "attention over HCA entries": "4·H·c·n/m a layer",
    "compressors": "2 a weight",
    "indexer projections": "2 a weight",
    "indexer scores": "2·heads·size a key: n/4, V3.2 n",
    "routed experts": "2 a weight of the chosen ones",
    "shared experts": "2 a weight",
    "dense feed-forward": "2 a weight",
    "gates": "2 a weight",
    "hyper-connections": "maps and mixing of streams",
    "head": "2 a weight",
}


def _flops(plans: _Models) -> list[_Row]:
    rows = []
    for name, note in _TERM_NOTES.items():
        sums = [sum(t.flops for t in plan.flops if t.name == name) for plan in plans]
        if any(sums):
            rows.append(_Row(label=name, cells=tuple(map(_number, sums)), note=note))
    return [
        *rows,
        _row("all", plans, lambda p: _number(p.total_flops)),
        _row(
            "all, FP8-equivalent",
            plans,
            lambda p: _number(p.fp8_flops),
            note="bf16 counts 2, FP4·FP4 0.5",
            is_sum=True,
        ),
    ]


def _shares(ratios: Sequence[Comparison]) -> list[_Row]:
    flops = tuple(_share(r.flops) for r in ratios)
    plain = tuple(_share(r.flops_unweighted) for r in ratios)
    cache = tuple(_share(r.cache) for r in ratios)
    rows = [
        _Row(label="FLOPs, FP8-equivalent", cells=flops, note="bf16 counts 2, FP4·FP4 0.5"),
        _Row(label="FLOPs, unweighted", cells=plain),
        _Row(label="cache, as deployed", cells=cache),
    ]
    if any(r.published_flops is not None for r in ratios):
        reported = tuple(_share(r.published_flops, digits=0) for r in ratios)
        note = "DeepSeek-V4 report, figure 1"
        rows.insert(1, _Row(label="  the report says", cells=reported, note=note))
        reported = tuple(_share(r.published_cache, digits=0) for r in ratios)
        rows.append(_Row(label="  the report says", cells=reported, note=note))
    return rows


def _speed(plans: _Models) -> list[_Row]:
    rows = [
        _row(
            "weights read a forward", plans, lambda p: _bytes(p.traffic.dense + p.traffic.experts)
        ),
        _row("cache read a forward", plans, lambda p: _bytes(p.traffic.cache)),
    ]
    for index, found in enumerate(plans[0].gpus):
        needed = tuple(f"{plan.gpus[index].needed:,}" for plan in plans)
        speed = tuple(_rate(plan.gpus[index].tokens_per_second) for plan in plans)
        rows.append(
            _Row(label=f"{found.gpu.name} needed", cells=needed, note="for weights and caches")
        )
        rows.append(_Row(label="  tokens/s", cells=speed, note="bandwidth of all of them"))
    if plans[0].paged is not None:
        rows += [
            _row("experts in memory", plans, _paged_share),
            _row(
                "memory in all", plans, lambda p: _bytes(p.paged.resident_bytes if p.paged else 0)
            ),
            _row("tokens/s from disk", plans, _paged_speed, note="uniform routing", is_sum=True),
        ]
    return rows


def _paged_share(plan: ModelPlan) -> str:
    return f"{100 * plan.paged.resident_share:.1f} %" if plan.paged else "-"


def _paged_speed(plan: ModelPlan) -> str:
    if plan.paged is None or plan.paged.tokens_per_second is None:
        return "no limit"
    return _rate(plan.paged.tokens_per_second)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _footnotes(request: PlanRequest, plans: _Models) -> Iterator[str]:
    from dspark.base_model.plan_devices import USABLE

    beyond = [plan.name for plan in plans if request.context > plan.max_context]
    yield ""
    yield (
        f"GPUs hold weights and caches in {100 * USABLE:.0f} % of their memory. Tokens/s: what "
        "bandwidth allows, experts chosen uniformly."
    )
    if beyond:
        yield f"{request.context:,} tokens are more than {', '.join(beyond)} is made for."


def _share(value: float | None, digits: int = 1) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.{digits if value >= 0.001 else 3}f} %"


def _parameter_count(value: float) -> str:
    return _scaled(value, ("", "k", "M", "B", "T"))


def _number(value: float) -> str:
    return _scaled(value, ("", " k", " M", " G", " T"))


def _bytes(value: float) -> str:
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def _scaled(value: float, units: Sequence[str]) -> str:
    """Three significant digits and a decimal unit; a dash for nothing."""
    if value == 0:
        return "-"
    size, index = float(value), 0
    while size >= 999.5 and index < len(units) - 1:
        size, index = size / 1000, index + 1
    digits = 0 if index == 0 or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:.{digits}f}{units[index]}"
