"""A training recipe: one TOML file, read into frozen dataclasses and checked by name.

Every section of the file is a dataclass (`dspark.training.sections`), every key a field; what the
file leaves out has the field's default, or that of the kind of draft. Unknown keys, wrong types and
values out of range are refused.
"""

from __future__ import annotations

import json
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from dspark.errors import ConfigError
from dspark.training.sections import (
    KIND_DEFAULTS,
    KINDS,
    DataSection,
    DraftSection,
    LossSection,
    OptimizerSection,
    RunSection,
    ScheduleSection,
)

__all__ = [
    "KINDS",
    "DataSection",
    "DraftSection",
    "LossSection",
    "OptimizerSection",
    "Recipe",
    "RunSection",
    "ScheduleSection",
    "make_recipe",
    "read_recipe",
]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole recipe.

    Attributes:
        target: Alias, folder, .gguf file or hub id of the target.
        draft: What is trained.
        data: On what.
        loss: What is minimised.
        optimizer: How.
        schedule: The learning rate over time.
        run: How long.
    """

    target: str
    draft: DraftSection = field(default_factory=DraftSection)
    data: DataSection
    loss: LossSection = field(default_factory=LossSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    run: RunSection

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; `read_recipe` of the same values gives the same recipe."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def lines(self) -> list[str]:
        """The resolved recipe for people, one `key = value` a line."""
        shown = [f"target = {json.dumps(self.target)}"]
        for name, section in self.to_json().items():
            if isinstance(section, dict):
                shown += [f"{name}.{key} = {json.dumps(value)}" for key, value in section.items()]
        return shown


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: A TOML file; shard files and the cache folder are relative to it.
        changes: "section.key=value", value in TOML or a bare word; `target=NAME` too.

    Returns:
        The recipe, with absolute paths.

    Raises:
        ConfigError: If the file cannot be read or a key or value is wrong.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"the recipe {path} cannot be read: {exc.strerror}.") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the recipe {path} is not TOML: {exc}.") from exc
    for change in changes:
        _apply(values, change)
    return _with_paths(make_recipe(values), path.parent)


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Make a recipe from parsed values; see `read_recipe`."""
    return _build(Recipe, _with_kind_defaults(values), "")


def _with_kind_defaults(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values, with the kind's defaults where nothing is said."""
    draft = values.get("draft", {})
    kind = draft.get("kind") if isinstance(draft, Mapping) else None
    merged = dict(values)
    for section, defaults in KIND_DEFAULTS.get(str(kind), {}).items():
        own = values.get(section, {})
        if isinstance(own, Mapping):
            merged[section] = {**defaults, **own}
    return merged


def _with_paths(recipe: Recipe, base: Path) -> Recipe:
    def absolute(text: str) -> str:
        return str((base / Path(text).expanduser()).absolute())

    shards = tuple(absolute(shard) for shard in recipe.data.shards)
    cache = recipe.run.cache
    run = recipe.run if cache is None else replace(recipe.run, cache=absolute(cache))
    return replace(recipe, data=replace(recipe.data, shards=shards), run=run)


def _apply(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals:
        raise ConfigError(f"--set {change!r} must have the form section.key=value.")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    section, _, name = key.strip().rpartition(".")
    place = values.setdefault(section, {}) if section else values
    if not isinstance(place, dict):
        raise ConfigError(f"--set {change!r} names {section!r}, which is no section.")
    if text.strip() == "null":
        place.pop(name, None)
    else:
        place[name] = value


def _build(kind: type[_T], values: Mapping[str, Any], where: str) -> _T:
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(
            f"the recipe has no key {where}{unknown[0]}; known are {', '.join(known)}."
        )
    ready: dict[str, Any] = {}
    for name, item in known.items():
        if name in values:
            ready[name] = _convert(hints[name], values[name], f"{where}{name}")
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"the recipe lacks {where}{name}.")
    return kind(**ready)


def _convert(hint: Any, value: Any, name: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        matches, converted = _try(option, value, name)
        if matches:
            return converted
    allowed = " or ".join(_describe(option) for option in options if option is not type(None))
    raise ConfigError(f"{name} is {value!r}, but must be {allowed}.")


def _try(option: Any, value: Any, name: str) -> tuple[bool, Any]:
    if get_origin(option) is tuple:
        inner = get_args(option)[0]
        if isinstance(value, list | tuple):
            return True, tuple(_convert(inner, item, name) for item in value)
    elif hasattr(option, "__dataclass_fields__"):
        if isinstance(value, Mapping):
            return True, _build(option, value, f"{name}.")
    elif option is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return True, float(value)
    elif type(value) is option:
        return True, value
    return False, None


def _describe(option: Any) -> str:
    if get_origin(option) is tuple:
        return "a list"
    if hasattr(option, "__dataclass_fields__"):
        return "a section"
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[option]
