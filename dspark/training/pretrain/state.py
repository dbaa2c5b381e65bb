"""Checkpoints of training: safetensors and JSON, written aside and renamed, the newest two kept.

    <folder>/state/step-00001200/state.safetensors, state.json
    <folder>/log.jsonl

A process may be killed at any moment: a half-written state has another name and is removed by the
next start, and lines of the log behind the state that is resumed are cut off.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark.errors import CheckpointError

__all__ = ["LOG", "append_log", "cut_log", "find_state", "load_state", "read_log", "save_state"]

LOG = "log.jsonl"
_NAME = re.compile(r"step-(\d{8})")
_KEPT = 2


def save_state(folder: Path, step: int, tensors: Mapping[str, Tensor], note: Any) -> Path:
    """Write a state; older ones but one are removed.

    Args:
        folder: Of the run.
        step: Steps done.
        tensors: Everything that training goes on from.
        note: JSON values kept with it.

    Raises:
        CheckpointError: If it cannot be written.
    """
    place = folder / "state"
    final, partial = place / f"step-{step:08d}", place / f".partial-{os.getpid()}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, _weights(partial))
        (partial / "state.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
        for path in partial.iterdir():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        if final.exists():  # the same step again, after a restart without progress
            shutil.rmtree(final)
        partial.rename(final)
    except (OSError, SafetensorError) as exc:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"the state in {place} cannot be written: {exc}.") from exc
    for old in _states(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def find_state(folder: Path) -> Path | None:
    """The newest state of a run, None if there is none; removes what killed processes left."""
    for path in (folder / "state").glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)
    states = _states(folder)
    return states[-1] if states else None


def load_state(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors and note of a state.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        tensors = load_file(_weights(path))
        note = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as exc:
        raise CheckpointError(
            f"{path} cannot be read: {exc}.", hint="remove this folder to go on from the one before"
        ) from exc
    return tensors, note


def append_log(folder: Path, row: Mapping[str, Any]) -> None:
    """Add a line to the log."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(row) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of the log."""
    path = folder / LOG
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line of a killed process
            break
    return rows


def cut_log(folder: Path, step: int) -> None:
    """Drop what the log says of steps behind `step`."""
    rows = [row for row in read_log(folder) if row["step"] <= step]
    if not (folder / LOG).exists():
        return
    text = "".join(json.dumps(row) + "\n" for row in rows)
    partial = folder / f".{LOG}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / LOG)


def _weights(folder: Path) -> Path:
    return folder / "state.safetensors"


def _states(folder: Path) -> list[Path]:
    found = (folder / "state").glob("step-*")
    return sorted(path for path in found if _NAME.fullmatch(path.name))
