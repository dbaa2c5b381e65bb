"""Finding the code that loads a model: the core knows targets by protocol and entry point only.

A loader is registered under the entry-point group `dspark.targets` as an object with `handles` and
`load` (see `TargetLoader`). The first that handles a model's config loads it; the one over
transformers is asked last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dspark.errors import CapabilityError, CheckpointError, ConfigError
from dspark.installed import entry_points

if TYPE_CHECKING:
    from dspark.target import Target
    from dspark.text import TextCodec

__all__ = [
    "DRAFT_QUANTS",
    "LoadOptions",
    "LoadedTarget",
    "QUANTS",
    "TargetLoader",
    "find_loader",
    "load_target",
    "pack_draft",
]

GROUP = "dspark.targets"

QUANTS = ("none", "int8", "int4")
"""Values of LoadOptions.quant."""

DRAFT_QUANTS = ("auto", "none", "int8")
"""Values of LoadOptions.draft_quant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load a target.

    Attributes:
        name: What to call it.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto", or a torch device.
        exact: True, False, or None to let the probe decide.
        probe_folder: Where findings of the probe are kept, None not to keep them.
        expert_memory: Bytes of expert weights to keep in memory, the others being read from disk as
            they are wanted; None keeps all. Only for targets that can (DeepSeek-V4).
        is_reference: Run the model as its own library does, for plain decoding only.
        has_many_rows: Forwards will have hundreds of rows (training), not a few: choose kernels
            for that. Goes with exact=False.
        path: How a wrapped target runs: "fused" (dspark.adapters.fused), "plain" (stock modules),
            or "auto", the faster one on this machine.
        quant: What the weights of linear layers are rounded to: "none", "int8" or "int4". Only for
            targets that can (those that wrap transformers).
        draft_quant: The same for the draft: "none", "int8", or "auto", which rounds a draft module
            where that is faster, and a draft model as its target.
    """

    name: str
    dtype: str = "auto"
    device: str = "auto"
    exact: bool | None = None
    probe_folder: Path | None = None
    expert_memory: int | None = None
    is_reference: bool = False
    has_many_rows: bool = False
    path: str = "auto"
    quant: str = "none"
    draft_quant: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTarget:
    """A loaded target and what came with it.

    Attributes:
        target: The target.
        codec: Its text codec, or None if the folder has no tokenizer.
        sampling: The model's own sampling defaults: temperature, top_k, top_p, min_p,
            repetition_penalty, as far as it states them.
        folder: Where it was loaded from.
    """

    target: Target
    codec: TextCodec | None
    sampling: Mapping[str, float] = field(default_factory=dict)
    folder: Path


@runtime_checkable
class TargetLoader(Protocol):
    """Loads models of some kinds."""

    @property
    def priority(self) -> int:
        """Loaders are asked in falling order of this."""
        ...

    def handles(self, config: Mapping[str, Any]) -> bool:
        """True if this loader loads models with such a config.json."""
        ...

    def load(self, folder: Path, options: LoadOptions) -> LoadedTarget:
        """Load a model from a folder."""
        ...


def find_loader(config: Mapping[str, Any], *, is_reference: bool = False) -> TargetLoader:
    """Find the loader for a model.

    Args:
        config: Its config.json.
        is_reference: Ask for one that runs the model as its own library does, for plain decoding;
            such a loader has the attribute `is_reference`.

    Raises:
        CheckpointError: If no installed loader handles it.
    """
    every = [point.load() for point in entry_points(group=GROUP)]
    loaders = [item for item in every if getattr(item, "is_reference", False) is is_reference]
    for loader in sorted(loaders, key=lambda item: -int(item.priority)):
        if loader.handles(config):
            found: TargetLoader = loader
            return found
    raise CheckpointError(
        f"no installed loader handles models of type {config.get('model_type')!r}.",
        hint="run: dspark models",
    )


def load_target(folder: Path, options: LoadOptions) -> LoadedTarget:
    """Load the model in a folder.

    Args:
        folder: A folder with config.json and weights.
        options: How.

    Raises:
        CheckpointError: If config.json is missing or unreadable, a draft's, or nobody handles it.
        CapabilityError: If `quant` is asked of a loader without the attribute `can_quantise`.
        ConfigError: If `quant` is none of QUANTS, or `draft_quant` none of DRAFT_QUANTS.
    """
    _check_draft_quant(options.draft_quant)
    if options.quant not in QUANTS:
        raise ConfigError(f"quant is {options.quant!r}, but must be one of {', '.join(QUANTS)}.")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise CheckpointError(f"{folder} holds no model: it has no config.json.") from exc
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} cannot be read as JSON: {exc}") from exc
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    _refuse_draft(config, options.name)
    loader = find_loader(config, is_reference=options.is_reference)
    if options.quant != "none" and not getattr(loader, "can_quantise", False):
        raise CapabilityError(
            f"{options.name} cannot be rounded to {options.quant} as it is loaded.",
            hint="leave out --quant",
        )
    return loader.load(folder, options)


def _refuse_draft(config: Mapping[str, Any], name: str) -> None:
    from dspark.draft.formats.detect import is_draft

    if is_draft(config):
        raise CheckpointError(
            f"{name} is a draft module, which drafts for a model and is none itself.",
            hint="give it as --draft, beside the model that it was trained for",
        )


def pack_draft(module: object, options: LoadOptions) -> str:
    """Put the linear layers of a draft module on packed weights, where a loader knows how.

    Such a loader has a method `pack_draft(module, draft_quant, path)` that does what this does.

    Args:
        module: The module, which is changed in place.
        options: `draft_quant` and `path` say how.

    Returns:
        How the weights are stored now, "" if they are left as they are.

    Raises:
        ConfigError: If `draft_quant` or `path` is none of its values.
    """
    _check_draft_quant(options.draft_quant)
    for point in entry_points(group=GROUP):
        pack = getattr(point.load(), "pack_draft", None)
        if pack is not None:
            return str(pack(module, options.draft_quant, options.path))
    return ""


def _check_draft_quant(quant: str) -> None:
    if quant not in DRAFT_QUANTS:
        values = ", ".join(DRAFT_QUANTS)
        raise ConfigError(f"draft_quant is {quant!r}, but must be one of {values}.")
