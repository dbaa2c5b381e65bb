"""What may be compared: settings that differ, and pairs of configurations.

Two results compare if machine, model and workload are the same. What drafts (the draft itself, the
tree's budget, depth and width) and what dspark and its libraries were is what comparisons are made
for: such a difference is named on the page and refused nowhere. Everything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dspark.errors import ConfigError
from dspark.eval.report.numbers import value_text
from dspark.eval.report.read import Inputs, ResultFile
from dspark.eval.report.schema import BenchConfiguration, EvalConfiguration

__all__ = ["Difference", "find_differences", "mates", "pair_up", "refuse"]

T = TypeVar("T")
_MISSING = object()

_DRAFTING = ("tree_budget", "depth", "width", "draft")
_MACHINE = ("processor", "platform", "device", "threads")
_ASKED = ("template", "think", "effort", "seed", "batch", "warm_ups")
_UNKNOWN_TO_STEPS = ("seed", "batch", "template", "think", "effort")
_EXACT = ("enabled", "holds", "backend", "min_rows", "max_nodes")  # the others vary in time
_VERSIONS = ("dspark", "code", "commit", "dirty", "python", "repeats")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A field in which two files differ.

    Attributes:
        field: Its name.
        files: The files' names.
        values: Their values, as text.
        is_setting: True if figures of the two do not compare because of it.
    """

    field: str
    files: tuple[str, str]
    values: tuple[str, str]
    is_setting: bool


def find_differences(inputs: Inputs) -> list[Difference]:
    """In what the files of a report differ.

    Files of one kind are held against the first of it in all their settings, the first files of
    two kinds in what both say of machine and model.

    Raises:
        ConfigError: If two files of a kind have no configuration in common.
    """
    found: list[Difference] = []
    firsts = []
    for kind in dict.fromkeys(file.kind for file in inputs.files):
        first, *others = inputs.of_kind(kind)
        firsts.append(first)
        for other in others:
            found += _within(first, other)
    for other in firsts[1:]:
        found += _identity(firsts[0], other)
    return found


def refuse(differences: Sequence[Difference]) -> None:
    """Refuse to compare what does not compare.

    Raises:
        ConfigError: If a difference is one of settings; it names every one.
    """
    pairs: dict[tuple[str, str], list[str]] = {}
    for item in differences:
        if item.is_setting:
            text = f"{item.field} ({item.values[0]} and {item.values[1]})"
            pairs.setdefault(item.files, []).append(text)
    if not pairs:
        return
    parts = [f"{a} and {b} in {', '.join(texts)}" for (a, b), texts in pairs.items()]
    raise ConfigError(
        f"results that differ in machine or settings do not compare: {'; '.join(parts)}.",
        hint="--force puts them on one page all the same, and the page says so",
    )


# -- fields -----------------------------------------------------------------------------------


def _within(first: ResultFile[Any], other: ResultFile[Any]) -> Iterator[Difference]:
    """Differences of two files of one kind."""
    settings, noted = _FIELDS[first.kind]
    yield from _differ(first, other, settings(first), settings(other), is_setting=True)
    yield from _differ(first, other, noted(first), noted(other), is_setting=False)
    if first.kind not in ("eval", "bench"):
        return
    pairs = pair_up(first.results.configurations, other.results.configurations, *_KEYS[first.kind])
    if not any(mate is not None for _, mate in pairs):
        raise ConfigError(f"{first.name} and {other.name} have no configuration in common.")
    seen: set[tuple[str, tuple[str, str]]] = set()
    for one, mate in pairs:
        if mate is None:
            continue
        for is_setting in (True, False):
            facts = [_configuration(cell, is_setting=is_setting) for cell in (one, mate)]
            for item in _differ(first, other, *facts, is_setting=is_setting):
                if (item.field, item.values) not in seen:
                    seen.add((item.field, item.values))
                    yield item


def _differ(
    first: ResultFile[Any],
    other: ResultFile[Any],
    one: Mapping[str, Any],
    two: Mapping[str, Any],
    *,
    is_setting: bool,
) -> Iterator[Difference]:
    for name in dict.fromkeys([*one, *two]):
        values = (one.get(name), two.get(name))
        if values[0] != values[1]:
            texts = (value_text(values[0]), value_text(values[1]))
            files = (first.name, other.name)
            if files[0] == files[1]:
                files = (f"{first.name} ({first.label})", f"{other.name} ({other.label})")
            yield Difference(field=name, files=files, values=texts, is_setting=is_setting)


def _header_settings(file: ResultFile[Any]) -> dict[str, Any]:
    header = file.raw["header"]
    return {
        **{name: header.get(name) for name in _MACHINE},
        "target": _identify(header["target"]),
        "dtype": header["target"].get("dtype"),
        "quant": header["target"].get("quant", "none"),
        **{f"exact.{name}": (header.get("exact") or {}).get(name) for name in _EXACT},
        **{name: header.get(name) for name in _ASKED},
    }


def _identify(model: Mapping[str, Any]) -> Any:
    """What tells a model from others: what its files hold, else its name."""
    return model.get("fingerprint") or model.get("id")


def _header_notes(file: ResultFile[Any]) -> dict[str, Any]:
    header = file.raw["header"]
    return {
        **{name: header.get(name) for name in _VERSIONS},
        **{f"libraries.{k}": v for k, v in (header.get("libraries") or {}).items()},
    }


def _bench_settings(file: ResultFile[Any]) -> dict[str, Any]:
    prompts = [item.get("sha256") for item in file.raw["header"].get("prompts") or []]
    baseline = file.raw.get("baseline")
    return {**_header_settings(file), "prompts.sha256": prompts, "baseline": baseline}


def _profile_settings(file: ResultFile[Any]) -> dict[str, Any]:
    header = _header_settings(file)
    for name in _UNKNOWN_TO_STEPS:
        header.pop(name)
    key = {k: v for k, v in (file.raw.get("key") or {}).items() if k != "torch"}
    how = {k: v for k, v in (file.raw.get("settings") or {}).items() if k != "repeats"}
    parts = (("key", key), ("settings", how))
    return {
        **header,
        **{
            f"{part}.{name}": value
            for part, values in parts
            for name, value in values.items()
            if not _is_repeated(name, value, header)
        },
    }


def _is_repeated(name: str, value: Any, header: Mapping[str, Any]) -> bool:
    """True if a profile's key or settings say once more what its header says."""
    return bool(header.get("exact.enabled" if name == "exact" else name, _MISSING) == value)


def _audit_settings(file: ResultFile[Any]) -> dict[str, Any]:
    header = _header_settings(file)
    for name in _UNKNOWN_TO_STEPS:  # an audit has its own settings for what it has of these
        header.pop(name)
    settings = {k: v for k, v in (file.raw.get("settings") or {}).items() if k not in _DRAFTING}
    return {**header, **{f"settings.{name}": value for name, value in settings.items()}}


def _audit_notes(file: ResultFile[Any]) -> dict[str, Any]:
    settings = file.raw.get("settings") or {}
    drafts = [_identify(draft) for draft in file.raw["header"].get("drafts") or []]
    return {
        **_header_notes(file),
        "draft": drafts,
        **{f"settings.{name}": settings.get(name) for name in _DRAFTING},
    }


def _simulate_settings(file: ResultFile[Any]) -> dict[str, Any]:
    settings = file.raw.get("settings") or {}
    left_out = ("requests", "seed", "skips", "pools")
    return {
        "target": _identify(file.raw["header"]["target"]),
        **{f"settings.{k}": v for k, v in settings.items() if k not in left_out},
    }


def _simulate_notes(file: ResultFile[Any]) -> dict[str, Any]:
    assumed = {f"assumption {i + 1}": t for i, t in enumerate(file.raw.get("assumptions") or [])}
    return {**_header_notes(file), **assumed}


_Facts = Callable[[ResultFile[Any]], dict[str, Any]]
_FIELDS: dict[str, tuple[_Facts, _Facts]] = {
    "bench": (_bench_settings, _header_notes),
    "eval": (_header_settings, _header_notes),
    "profile": (_profile_settings, _header_notes),
    "simulate": (_simulate_settings, _simulate_notes),
    "audit": (_audit_settings, _audit_notes),
}


def _configuration(
    cell: EvalConfiguration | BenchConfiguration, *, is_setting: bool
) -> dict[str, Any]:
    """A configuration's settings, or what it compares."""
    sampling = {
        f"sampling.{name}": value
        for name, value in cell.sampling.items()
        if (name in _DRAFTING) != is_setting
    }
    if isinstance(cell, EvalConfiguration):
        own = (
            {"prompts.sha256": cell.prompts.sha256}
            if is_setting
            else {"draft": cell.draft.id, "draft.fingerprint": cell.draft.fingerprint}
        )
        return {**own, **sampling}
    if is_setting:
        return {"runner": cell.runner, "mode": cell.mode, "is_exact": cell.is_exact, **sampling}
    library = None if cell.library is None else f"{cell.library.name} {cell.library.version}"
    return {"draft": cell.draft, "library": library, "url": cell.url, **sampling}


def _identity(first: ResultFile[Any], other: ResultFile[Any]) -> Iterator[Difference]:
    """Differences of two files of different kinds, in what both of them state."""
    one, two = _facts_of_run(first), _facts_of_run(other)
    both = [name for name in one if one[name] is not None and two.get(name) is not None]
    facts = [{name: known[name] for name in both} for known in (one, two)]
    return _differ(first, other, *facts, is_setting=True)


def _facts_of_run(file: ResultFile[Any]) -> dict[str, Any]:
    header = file.raw["header"]
    target = header["target"]
    if file.kind == "simulate":  # whatever it ran on is not what it is about
        return {"target": _identify(target)}
    return {
        "processor": header.get("processor"),
        "platform": header.get("platform"),
        "device": header.get("device"),
        "threads": header.get("threads"),
        "target": _identify(target),
        "dtype": target.get("dtype"),
        "quant": target.get("quant", "none"),
        "family": target.get("family"),
        "vocab_size": target.get("vocab_size"),
        "exact.enabled": (header.get("exact") or {}).get("enabled"),
    }


# -- pairs ------------------------------------------------------------------------------------


def pair_up(
    first: Sequence[T], other: Sequence[T], *keys: Callable[[T], Hashable]
) -> list[tuple[T, T | None]]:
    """Find each item's mate: by the first key that tells one of each apart, else the only two left.

    Args:
        first: Items.
        other: Items to find mates among.
        keys: From the strictest to the loosest.

    Returns:
        Every item of `first` with its mate or None, in order.
    """
    mates: dict[int, T] = {}
    left = list(other)
    for key in keys:
        for at, item in enumerate(first):
            if at in mates:
                continue
            alike = [x for i, x in enumerate(first) if i not in mates and key(x) == key(item)]
            found = [x for x in left if key(x) == key(item)]
            if len(alike) == len(found) == 1:
                mates[at] = found[0]
                left = [x for x in left if x is not found[0]]
    if len(first) == len(other) == len(left) == 1:
        mates[0] = left[0]
    return [(item, mates.get(at)) for at, item in enumerate(first)]


def _by_name(cell: Any) -> Hashable:
    return str(cell.name)


def _by_workload(cell: Any) -> Hashable:
    """All settings of a configuration; of the draft, only whether there is one."""
    draft = cell.draft if isinstance(cell, BenchConfiguration) else cell.draft.id
    return repr((draft == "none", sorted(_configuration(cell, is_setting=True).items())))


_KEYS: dict[str, tuple[Callable[[Any], Hashable], ...]] = {
    "eval": (_by_name, _by_workload),
    "bench": (_by_name, _by_workload),
}


def mates(files: Sequence[ResultFile[Any]]) -> list[list[Any]]:
    """Rows of configurations that compare: one per configuration of the first file.

    Args:
        files: Files of one kind, "eval" or "bench".

    Returns:
        Rows as long as `files`, None where a file has no mate.
    """
    first, *others = files
    columns = [
        [
            mate
            for _, mate in pair_up(
                first.results.configurations, other.results.configurations, *_KEYS[first.kind]
            )
        ]
        for other in others
    ]
    rows = zip(first.results.configurations, *columns, strict=True)
    return [list(row) for row in rows]
