"""Drafts that come with the package, found by the model they were made for.

    dspark/models/shipped/<name>/    config.json, draft.safetensors, README.md, calibration.json
    dspark/models/shipped/<name>/    corpus.safetensors, README.md

The first is a trained draft, the second a lookup corpus of the model's own answers. Either fits a
target if both name the same source: for a model made from a GGUF file, the alias and the checksum
of that file. So a copy of the model under another name has the draft too, and a model of the same
name with other weights has not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dspark.models.store import MARKER

__all__ = ["CORPUS", "SHIPPED", "find_shipped", "shipped_drafts", "shipped_folders", "source_of"]

SHIPPED = Path(__file__).parent / "shipped"
"""The folder of the package that holds them."""


CORPUS = "corpus.safetensors"
"""File of a lookup corpus; `dspark.loading.find_corpus` finds one."""


def source_of(folder: Path) -> dict[str, Any] | None:
    """What a model was made from, None if its folder does not say.

    Args:
        folder: The model's.
    """
    return _read(folder / MARKER).get("source") or None


def shipped_folders(shipped: Path = SHIPPED) -> dict[str, Path]:
    """Folders of the drafts that come with the package, by name."""
    return {path.parent.name: path.parent for path in sorted(shipped.glob("*/config.json"))}


def shipped_drafts(shipped: Path = SHIPPED) -> dict[str, str]:
    """Trained drafts that come with the package: name -> alias of the target."""
    found = {}
    for name, folder in shipped_folders(shipped).items():
        target = _read(folder / "config.json").get("dspark_draft", {}).get("target", {})
        if alias := (target.get("source") or {}).get("alias"):
            found[name] = str(alias)
    return found


def find_shipped(folder: Path, *, shipped: Path = SHIPPED) -> Path | None:
    """The draft that comes with the package for a model, None if there is none.

    Args:
        folder: The model's.
        shipped: Where the drafts lie.
    """
    source = source_of(folder)
    if source is None:
        return None
    for draft in shipped_folders(shipped).values():
        fields = _read(draft / "config.json").get("dspark_draft", {})
        if fields.get("target", {}).get("source") == source:
            return draft
    return None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none: a folder of somebody else's is no error here."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
