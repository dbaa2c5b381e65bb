"""What `dspark bench` shows while it runs: a bar on a terminal, else a line for every run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dspark.commands import console as ui
from dspark.eval.bench_progress import TimeLeft

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from dspark.eval.bench import Contestant, Planned, Watcher
    from dspark.eval.bench_records import RunRecord

__all__ = ["show_progress"]


@contextmanager
def show_progress(
    console: Console, planned: Sequence[Planned], *, is_on: bool
) -> Iterator[Watcher]:
    """Whoever a benchmark tells what happens.

    Args:
        console: Standard error.
        planned: All runs.
        is_on: Show anything at all.
    """
    if not is_on:
        yield _Silent()
    elif not console.is_terminal:
        yield _Lines(console, planned)
    else:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[done]} of {task.total:.0f} runs"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
        )
        with Progress(*columns, console=console) as bar:
            yield _Bar(bar, bar.add_task("", total=len(planned), done=0, left=""), planned)


class _Silent:
    """Shows nothing."""

    def preparing(self, contestant: Contestant) -> None:
        """A runner loads."""

    def warming_up(self, planned: Planned) -> None:
        """A configuration runs without being measured."""

    def started(self, planned: Planned) -> None:
        """A run begins."""

    def advanced(self, share: float) -> None:
        """So much of the run is done."""

    def finished(self, planned: Planned, record: RunRecord, *, is_fresh: bool) -> None:
        """A run is done."""

    def dropped(self, planned: Planned) -> None:
        """A run is left out."""


class _Timed(_Silent):
    """Keeps the estimate of the time left."""

    def __init__(self, planned: Sequence[Planned]) -> None:
        self.left = TimeLeft(planned)
        self.repeats = max((item.repeat for item in planned), default=0) + 1

    def started(self, planned: Planned) -> None:
        self.left.started(planned)

    def advanced(self, share: float) -> None:
        self.left.advanced(share)

    def finished(self, planned: Planned, record: RunRecord, *, is_fresh: bool) -> None:
        self.left.ended(planned, record.output.seconds)

    def dropped(self, planned: Planned) -> None:
        self.left.ended(planned, None)

    def describe(self, planned: Planned) -> str:
        """A run in words."""
        level = f"concurrency {planned.concurrency}"
        return f"{planned.contestant.name}, {level}, repeat {planned.repeat + 1} of {self.repeats}"

    @property
    def time_left(self) -> str:
        """The estimate in words, "" if there is none or nothing to wait for."""
        seconds = self.left.seconds()
        if not seconds:
            return ""
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        if hours:
            return f"{hours} h {minutes:02d} min left"
        return f"{minutes} min {rest:02d} s left" if minutes else f"{rest} s left"


class _Lines(_Timed):
    """A line for every run that is done."""

    def __init__(self, console: Console, planned: Sequence[Planned]) -> None:
        super().__init__(planned)
        self._console = console

    def finished(self, planned: Planned, record: RunRecord, *, is_fresh: bool) -> None:
        super().finished(planned, record, is_fresh=is_fresh)
        if not is_fresh:
            return
        output = record.output
        failed = sum(item.error is not None for item in output.requests)
        parts = [f"{output.output_tokens / max(output.seconds, 1e-9):.1f} tok/s"]
        parts += [f"{failed} failed"] if failed else []
        parts += [self.time_left] if self.time_left else []
        ui.print_note(self._console, f"{self.describe(planned)}: {', '.join(parts)}")


class _Bar(_Timed):
    """A bar of runs, with the time left."""

    def __init__(self, bar: Progress, task: TaskID, planned: Sequence[Planned]) -> None:
        super().__init__(planned)
        self._bar = bar
        self._task = task
        self._done = 0

    def preparing(self, contestant: Contestant) -> None:
        self._update(description=f"loading {contestant.name}")

    def warming_up(self, planned: Planned) -> None:
        self._update(
            description=f"warming up {planned.contestant.name}, concurrency {planned.concurrency}"
        )

    def started(self, planned: Planned) -> None:
        super().started(planned)
        self._update(description=self.describe(planned))

    def advanced(self, share: float) -> None:
        super().advanced(share)
        self._update(completed=self._done + share)

    def finished(self, planned: Planned, record: RunRecord, *, is_fresh: bool) -> None:
        super().finished(planned, record, is_fresh=is_fresh)
        self._done += 1
        self._update(completed=self._done)

    def dropped(self, planned: Planned) -> None:
        super().dropped(planned)
        self._done += 1
        self._update(completed=self._done)

    def _update(self, **fields: Any) -> None:
        self._bar.update(self._task, done=self._done, left=self.time_left, **fields)
