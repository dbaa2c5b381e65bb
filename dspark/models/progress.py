"""Progress of downloads and conversions: a bar on stderr if that is a terminal, else nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["SILENT", "ProgressSink", "open_progress"]


class ProgressSink(Protocol):
    """What the work reports to."""

    def stage(self, text: str, total: int | None) -> None:
        """Begin a stage of `total` units (bytes or items; None: unknown)."""
        ...

    def advance_to(self, done: int) -> None:
        """Say how many units of the stage are done."""
        ...


class _Silent:
    def stage(self, text: str, total: int | None) -> None:
        """Ignore it."""

    def advance_to(self, done: int) -> None:
        """Ignore it."""


SILENT: ProgressSink = _Silent()
"""Reports nothing."""


class _Bar:
    def __init__(self, bar: RichProgress) -> None:
        self._bar = bar
        self._task: TaskID | None = None

    def stage(self, text: str, total: int | None) -> None:
        """Complete the bar of the stage before and add one."""
        if self._task is not None:
            done = self._bar.tasks[-1]
            self._bar.update(self._task, total=done.total or 1, completed=done.total or 1)
        self._task = self._bar.add_task(text, total=total)

    def advance_to(self, done: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._bar.update(self._task, completed=done)


@contextmanager
def open_progress(enabled: bool | None = None) -> Iterator[ProgressSink]:
    """Show progress while the block runs.

    Args:
        enabled: True or False, or None for "if stderr is a terminal".

    Yields:
        Where to report.
    """
    if not (sys.stderr.isatty() if enabled is None else enabled):
        yield SILENT
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar)
