"""What loaders read in a model folder besides config and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["fingerprint_weights", "generation_config", "sampling_defaults"]

_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def generation_config(folder: Path) -> dict[str, Any]:
    """The folder's generation_config.json; empty if there is none that can be read."""
    try:
        data = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def sampling_defaults(folder: Path) -> dict[str, float]:
    """What generation_config.json says about sampling; empty if it says greedy, or nothing."""
    generation = generation_config(folder)
    if not generation.get("do_sample"):
        return {}
    names = [name for name in _SAMPLING_FIELDS if generation.get(name) is not None]
    # A model that samples and does not say at which temperature means 1.
    return {"temperature": 1.0, **{name: generation[name] for name in names}}


def fingerprint_weights(folder: Path) -> str:
    """A cheap fingerprint of the weight files, for records that depend on them."""
    files = sorted(folder.glob("*.safetensors"))
    return " ".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)
