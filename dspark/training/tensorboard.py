"""TensorBoard logs of a run, for those who have it and ask for it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspark.errors import ConfigError
from dspark.training.metrics import Figures
from dspark.training.progress import Reporter, StepReport, ValidationReport

__all__ = ["with_tensorboard"]


class _Both:
    """Passes reports on, and writes their figures."""

    def __init__(self, inner: Reporter, writer: Any) -> None:
        self._inner = inner
        self._writer = writer

    def step(self, report: StepReport) -> None:
        """Write a step's figures."""
        self._write("train", report.step, report.figures)
        self._writer.add_scalar("train/learning_rate", report.rate, report.step)
        self._writer.add_scalar("train/gradient", report.gradient, report.step)
        self._inner.step(report)

    def validation(self, report: ValidationReport) -> None:
        """Write a validation's figures."""
        self._write("held_out", report.step, report.figures)
        self._inner.validation(report)

    def note(self, text: str) -> None:
        """Pass it on."""
        self._inner.note(text)

    def _write(self, place: str, step: int, figures: Figures) -> None:
        for name in ("loss", "ce", "l1", "bce", "tau_greedy", "tau_sampling"):
            self._writer.add_scalar(f"{place}/{name}", getattr(figures, name), step)
        for depth, value in enumerate(figures.acceptance, start=1):
            self._writer.add_scalar(f"{place}/acceptance_{depth}", value, step)


@contextmanager
def with_tensorboard(inner: Reporter, folder: Path, *, is_on: bool) -> Iterator[Reporter]:
    """Write TensorBoard logs beside what a reporter does.

    Args:
        inner: The reporter.
        folder: The run's folder; logs go to its folder tensorboard.
        is_on: The recipe asks for them.

    Raises:
        ConfigError: If they are asked for and TensorBoard is not installed.
    """
    if not is_on:
        yield inner
        return
    try:
        module: Any = importlib.import_module("torch.utils.tensorboard")
    except ImportError as exc:
        raise ConfigError(
            "run.tensorboard is true, but TensorBoard is not installed.",
            hint="pip install 'dspark[train]'",
        ) from exc
    writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"))
    try:
        yield _Both(inner, writer)
    finally:
        writer.close()
