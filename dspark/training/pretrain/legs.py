"""Training in legs: each goes on exactly where the last state was written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dspark.errors import CheckpointError
from dspark.training.pretrain.state import (
    append_log,
    cut_log,
    find_state,
    load_state,
    save_state,
)

__all__ = ["Leg", "LegResult", "Progress", "Training", "load_weights", "resume", "run_leg"]

Report = Callable[[str], None]
_SHOWN_EVERY = 10  # steps between lines of progress


@dataclass(frozen=True, slots=True)
class Leg:
    """How far a leg goes.

    Attributes:
        max_minutes: Wall-clock minutes after which it stops, None for no limit.
        max_steps: Steps done in all after which it stops, None for the recipe's.
    """

    max_minutes: float | None = None
    max_steps: int | None = None


@dataclass(frozen=True, slots=True)
class LegResult:
    """Where a leg ended.

    Attributes:
        step: Steps done in all.
        total: Steps of the recipe.
        tokens: Tokens seen in all.
        seconds: Of training in all, all legs.
    """

    step: int
    total: int
    tokens: int
    seconds: float

    @property
    def is_done(self) -> bool:
        """True if all steps are done."""
        return self.step >= self.total


@dataclass(slots=True)
class Progress:
    """Where a run is.

    Attributes:
        step: Steps done.
        tokens: Tokens seen.
        seconds: Of steps, all legs.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Training(Protocol):
    """What a leg trains.

    Attributes:
        progress: Where it is; `load` sets it, `advance` moves it.
        total: Steps in all.
        validate_every: Steps between validations.
        checkpoint_minutes: Minutes between states.
    """

    progress: Progress
    total: int
    validate_every: int
    checkpoint_minutes: float

    def advance(self) -> dict[str, Any]:
        """Do one step; figures of it."""
        ...

    def validate(self) -> dict[str, Any]:
        """Figures on held-out text."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training goes on from."""
        ...

    def identity(self) -> dict[str, Any]:
        """JSON values that must be the same for training to go on from a state."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        ...


def run_leg(training: Training, folder: Path, leg: Leg, report: Report) -> LegResult:
    """Train until all steps are done or the leg's limit is reached.

    Args:
        training: At its start; goes on from the newest state of the folder, if there is one.
        folder: Of the run: states and log.
        leg: How far to go.
        report: Told a line now and then.

    Raises:
        CheckpointError: If the state cannot be read or written, or is of another run.
    """
    resume(training, folder)
    done, total = training.progress, training.total
    cut_log(folder, done.step)
    stop = total if leg.max_steps is None else min(total, leg.max_steps)
    started = saved = time.monotonic()
    report(f"step {done.step} of {total}")
    while done.step < stop:
        row = training.advance()
        if done.step % training.validate_every == 0 or done.step == total:
            row["held_out"] = training.validate()
        row["threads"] = torch.get_num_threads()
        append_log(folder, {"step": done.step, "tokens": done.tokens, **row})
        if done.step % _SHOWN_EVERY == 0 or "held_out" in row:
            report(_line(done, total, row))
        now = time.monotonic()
        is_late = leg.max_minutes is not None and now - started > 60 * leg.max_minutes
        if is_late or done.step == stop or now - saved > 60 * training.checkpoint_minutes:
            save_state(folder, done.step, training.tensors(), _note(training))
            saved = time.monotonic()
        if is_late:
            break
    return LegResult(done.step, total, done.tokens, done.seconds)


def resume(training: Training, folder: Path) -> bool:
    """Go on from the newest state of a folder; False if there is none.

    Raises:
        CheckpointError: If it cannot be read, or is of another run.
    """
    path = find_state(folder)
    if path is None:
        return False
    tensors, note = load_state(path)
    own = training.identity()
    for name, value in own.items():
        if _plain(note.get(name)) != _plain(value):
            raise CheckpointError(
                f"{path} was made with another {name}, so training cannot go on from it.",
                hint="give another folder, or the recipe and text it was made with",
            )
    training.load(tensors)
    done = training.progress
    done.step, done.tokens = int(note["step"]), int(note["tokens"])
    done.seconds = float(note["seconds"])
    return True


@torch.no_grad()
def load_weights(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy the weights of a state, which are under `model.`.

    Raises:
        CheckpointError: If they are of another model.
    """
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    own = network.state_dict()
    if weights.keys() != own.keys() or any(weights[k].shape != v.shape for k, v in own.items()):
        raise CheckpointError("the state of training is of another model.")
    network.load_state_dict(weights)


def _note(training: Training) -> dict[str, Any]:
    done = training.progress
    figures = {"step": done.step, "tokens": done.tokens, "seconds": done.seconds}
    return {**figures, **training.identity()}


def _line(done: Progress, total: int, row: dict[str, Any]) -> str:
    left = (total - done.step) * done.seconds / max(done.step, 1) / 60
    shown = {k: v for k, v in row.items() if isinstance(v, float)}
    figures = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
    text = f"step {done.step}/{total}  {figures}  {left:.0f} min left"
    for name, value in row.get("held_out", {}).items():
        numbers = value if isinstance(value, list) else [value]
        text += f"\n  held out {name}: " + " ".join(f"{number:.4f}" for number in numbers)
    return text


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value
