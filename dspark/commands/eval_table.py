"""The tables of `dspark eval`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dspark.commands.tables import Section

__all__ = ["eval_tables"]

Figures = Mapping[str, Any]


def eval_tables(results: Figures) -> Iterator[Section]:
    """Accepted lengths, counts, positions, groups and confidence, of an eval's results."""
    cells: Sequence[Figures] = results["configurations"]
    yield _lengths(cells)
    yield _counts(cells)
    for cell in cells:
        if cell["acceptance"]["per_position"]:
            yield _positions(cell)
    yield _groups(cells)
    for cell in cells:
        if cell["by_context"]:
            yield _contexts(cell)
    if any(cell["confidence"] for cell in cells):
        yield _confidence(cells)
    for name in cells[0]["definitions"]:
        yield _definition(name, cells)


def _lengths(cells: Sequence[Figures]) -> Section:
    rows = []
    for cell in cells:
        found = cell["acceptance"]
        tau, length = found["tau_means"], found["accept_len_means"]
        interval = found["tau_ci95"]
        rows.append(
            (
                cell["name"],
                _number(tau["per_round"]),
                "-" if interval is None else f"{interval[0]:.2f}..{interval[1]:.2f}",
                _number(tau["per_token"]),
                _number(tau["per_request"]),
                _number(length["per_round"]),
                _number(length["per_token"]),
                _number(length["per_request"]),
            )
        )
    names = ("tau", "95 %", "per token", "per request")
    more = ("accept_len", "per token", "per request")
    return Section(("configuration", *names, *more), tuple(rows))


def _counts(cells: Sequence[Figures]) -> Section:
    names = ("requests", "rounds", "proposed", "verified", "accepted")
    rows = []
    for cell in cells:
        found = cell["acceptance"]
        counts = [str(found[name]) for name in names]
        rates = (found["acceptance_rate"], found["verify_rate"], found["full_acceptance"])
        rows.append((cell["name"], *counts, *map(_share, rates)))
    heads = ("counts", *names, "acc/ver", "verify rate", "full")
    return Section(heads, tuple(rows))


def _positions(cell: Figures) -> Section:
    rates = cell["acceptance"]["per_position"]
    rows = tuple(
        (kind, *(_share(rate[kind]) for rate in rates))
        for kind in ("unconditional", "conditional", "of_offered")
    )
    depths = tuple(str(rate["position"]) for rate in rates)
    return Section((f"position: {cell['name']}", *depths), rows)


def _groups(cells: Sequence[Figures]) -> Section:
    names = list(dict.fromkeys(name for cell in cells for name in cell["by_category"]))
    rows = []
    for cell in cells:
        groups = cell["by_category"]
        taus = [groups[name]["tau"] if name in groups else None for name in names]
        rows.append((cell["name"], *map(_number, taus)))
    return Section(("tau by category", *names), tuple(rows))


def _contexts(cell: Figures) -> Section:
    rows = []
    for bucket in cell["by_context"]:
        end = "" if bucket["to"] is None else str(bucket["to"] - 1)
        counts = (str(bucket["prompts"]), str(bucket["rounds"]))
        means = (_number(bucket["tau"]), _number(bucket["accept_len"]))
        rows.append((f"{bucket['from']}..{end}", *counts, *means))
    heads = (f"context: {cell['name']}", "prompts", "rounds", "tau", "accept_len")
    return Section(heads, tuple(rows))


def _confidence(cells: Sequence[Figures]) -> Section:
    rows = []
    for cell in cells:
        quality = cell["confidence"]
        if quality is None:
            continue
        parts = [("all", quality)] + [(str(p["position"]), p) for p in quality["per_position"]]
        for depth, part in parts:
            label = f"{cell['name']}, {quality['rule']}, position {depth}"
            prefix, step = part["prefix"], part["step"]
            figures = [prefix[n] for n in ("predicted", "observed", "ece", "auroc", "brier")]
            figures += [step[n] for n in ("ece", "auroc")]
            rows.append((label, str(prefix["count"]), *(_number(f, 3) for f in figures)))
    names = ("n", "predicted", "observed", "ECE", "AUROC", "Brier", "step ECE", "step AUROC")
    return Section(("confidence", *names), tuple(rows))


def _definition(name: str, cells: Sequence[Figures]) -> Section:
    rows = []
    for cell in cells:
        for key, value in cell["definitions"][name].items():
            if key == "notes":
                rows += [(f"{cell['name']}: note", note) for note in value]
            elif isinstance(value, list):
                text = " ".join(_number(item, 3) for item in value)
                rows.append((f"{cell['name']}: {key}", text))
            else:
                text = str(value) if isinstance(value, int) else _number(value, 3)
                rows.append((f"{cell['name']}: {key}", text))
    return Section((f"as {name} counts", "value"), tuple(rows))


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
