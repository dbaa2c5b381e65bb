"""Names of configurations as tables and legends show them: as short as they can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dspark.eval.report.compare import mates
from dspark.eval.report.read import ResultFile
from dspark.eval.report.schema import EvalConfiguration

__all__ = ["Named", "named_configurations", "pair_name", "pair_names"]

Named = tuple[str, Any, ResultFile[Any]]
"""(label, configuration, the file it stands in)."""


def named_configurations(files: Sequence[ResultFile[Any]]) -> list[Named]:
    """All configurations of the files of a kind, those that compare one after the other.

    Args:
        files: Files of one kind, "eval" or "bench".

    Returns:
        Each with a label; with several files it begins with the file's letter.
    """
    ordered: list[tuple[Any, ResultFile[Any]]] = []
    rows = mates(files) if len(files) > 1 else [[c] for c in files[0].results.configurations]
    for row in rows:
        ordered += [(cell, file) for cell, file in zip(row, files, strict=True) if cell is not None]
    seen = {id(cell) for cell, _ in ordered}
    for file in files[1:]:
        rest = (cell for cell in file.results.configurations if id(cell) not in seen)
        ordered += [(cell, file) for cell in rest]
    names = _names([cell for cell, _ in ordered])
    if len(files) == 1:
        return [(name, cell, file) for name, (cell, file) in zip(names, ordered, strict=True)]
    return [
        (f"{file.label}: {name}", cell, file)
        for name, (cell, file) in zip(names, ordered, strict=True)
    ]


def pair_names(files: Sequence[ResultFile[Any]]) -> tuple[str, str]:
    """Heads of two columns that compare the first file with another: letters if there is one."""
    return (files[0].label, files[1].label if len(files) == 2 else "other")


def pair_name(files: Sequence[ResultFile[Any]], other: ResultFile[Any], cell: Any) -> str:
    """What a comparison calls a configuration of the first file, held against another file's."""
    named = {id(found): label for label, found, _ in named_configurations(files)}
    name = named[id(cell)].partition(": ")[2]
    return name if len(files) == 2 else f"{name}, {other.label}"


def _names(cells: Sequence[Any]) -> list[str]:
    """The draft and what else varies; a bench names its configurations itself."""
    if not all(isinstance(cell, EvalConfiguration) for cell in cells):
        return [str(cell.name) for cell in cells]
    parts = [_parts(cell) for cell in cells]
    varying = [k for k in parts[0] if k != "draft" and len({part[k] for part in parts}) > 1]
    laws = {(part["temperature"], part["rule"]) for part in parts}
    if len(laws) == len({temperature for temperature, _ in laws}):  # which says the rule, too
        varying = [k for k in varying if k != "rule"]
    short = [" ".join(part[k] for k in ("draft", *varying) if part[k]) for part in parts]
    full = [str(cell.name) for cell in cells]
    return short if len(set(short)) == len(set(zip(short, full, strict=True))) else full


def _parts(cell: EvalConfiguration) -> dict[str, str]:
    sampling = cell.sampling
    shape = {
        name: "" if sampling.get(key) is None else f"{name} {sampling[key]}"
        for name, key in (("width", "width"), ("depth", "depth"), ("budget", "tree_budget"))
    }
    temperature = sampling.get("temperature")
    return {
        "draft": cell.draft.id,
        **shape,
        "temperature": f"T={temperature:g}" if isinstance(temperature, int | float) else "",
        "rule": str(sampling.get("rule") or ""),
        "prompts": cell.prompts.name,
    }
