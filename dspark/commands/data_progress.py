"""What `dspark data` shows: a bar with the time left, and the counts at the end."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dspark.commands import console as ui
from dspark.training.data_run import Watcher

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

__all__ = ["ProgressWatcher", "print_plain", "print_table"]

_NOTES = 3  # notes of one kind in full; the others are counted


class ProgressWatcher(Watcher):
    """A bar on a terminal, a line per shard elsewhere.

    Args:
        console: Where to.
        is_quiet: Show nothing but what must be known.
    """

    def __init__(self, console: Console, *, is_quiet: bool) -> None:
        self._console = console
        self._is_quiet = is_quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._name, self._total, self._before, self._done = "", 0, 0, 0.0
        self._began = time.perf_counter()
        self._tokens = 0
        self._notes = 0

    def __enter__(self) -> ProgressWatcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._notes > _NOTES and not self._is_quiet:
            ui.print_note(self._console, f"and {self._notes - _NOTES} more such notes")

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def stage(self, name: str, total: int, done: int) -> None:
        """Begin a bar."""
        self._name, self._total, self._before, self._done = name, total, done, done
        self._began, self._tokens = time.perf_counter(), 0
        self.close()
        if self._is_quiet or not self._console.is_terminal:
            return
        from rich.progress import (
            BarColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Progress(*columns, console=self._console, transient=name != "answers")
        self._task = self._bar.add_task(name, total=total, completed=done, rate="", left="")
        self._bar.start()

    def advance(self, done: float, tokens: int) -> None:
        """Move the bar."""
        self._done, self._tokens = done, tokens
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, rate=self._rate(), left=self._left())

    def shard(self, index: int, count: int, rows: int) -> None:
        """Say so where there is no bar."""
        if self._bar is None and not self._is_quiet:
            parts = [f"shard {index + 1} of {count}: {rows} rows", self._rate(), self._left()]
            ui.print_note(self._console, ", ".join(part for part in parts if part))

    def note(self, text: str) -> None:
        """Show the first notes; the rest are counted."""
        self._notes += 1
        if self._notes <= _NOTES and not self._is_quiet:
            ui.print_note(self._console, text)

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._began

    def _rate(self) -> str:
        return f"{self._tokens / max(self._seconds, 1e-9):,.0f} tok/s" if self._tokens else ""

    def _left(self) -> str:
        """The time left, at the pace of this run so far."""
        done = self._done - self._before
        if done <= 0 or self._done >= self._total:
            return ""
        seconds = round(self._seconds * (self._total - self._done) / done)
        hours, rest = divmod(seconds, 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d} left"


def _counts(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Source, temperature, rows, and how many of them came to an end."""
    rows: Counter[tuple[str, float]] = Counter()
    ended: Counter[tuple[str, float]] = Counter()
    for kind in manifest["counts"]["answers"]["kinds"]:
        key = (kind["source"], kind["temperature"])
        rows[key] += kind["rows"]
        ended[key] += kind["rows"] if kind["finish"] == "stop" else 0
    for source, temperature in sorted(rows):
        key = (source, temperature)
        yield source, f"{temperature:g}", str(rows[key]), str(ended[key])


def _dropped(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    counts = manifest["counts"]
    for source, reasons in counts["prompts"]["dropped"].items():
        for reason, count in reasons.items():
            yield "prompts of " + source, reason, str(count)
    for reason, count in counts["answers"]["dropped"].items():
        yield "answers", reason, str(count)


_KINDS = ("source", "temperature", "rows", "ended")
_DROPS = ("dropped", "why", "count")


def print_plain(manifest: Mapping[str, Any], figures: Mapping[str, float]) -> None:
    """Print tab-separated lines: heads, then rows."""
    for heads, rows in ((_KINDS, _counts(manifest)), (_DROPS, _dropped(manifest))):
        for row in (heads, *rows):
            sys.stdout.write("\t".join(row) + "\n")
    sys.stdout.write(_total(manifest, figures) + "\n")


def print_table(manifest: Mapping[str, Any], figures: Mapping[str, float]) -> None:
    """Print tables for a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for heads, rows in ((_KINDS, list(_counts(manifest))), (_DROPS, list(_dropped(manifest)))):
        if not rows:
            continue
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for number, name in enumerate(heads):
            table.add_column(name, justify="left" if number == 0 or name == "why" else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    console.print(_total(manifest, figures), markup=False)


def _total(manifest: Mapping[str, Any], figures: Mapping[str, float]) -> str:
    answers, shards = manifest["counts"]["answers"], len(manifest["shards"])
    text = (
        f"{answers['rows']:,} rows, {answers['response_tokens']:,} response tokens, {shards} "
        f"shard{'s' if shards != 1 else ''}"
    )
    if not figures["tokens"]:
        return text + "; all were there already"
    rate = figures["tokens_per_second"]
    return f"{text}; {figures['tokens']:,} tokens made at {rate:,.0f} tok/s"
