"""What `dspark train` shows: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dspark.commands import console as ui
from dspark.training.progress import Reporter, SilentReporter, StepReport, ValidationReport

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

__all__ = ["open_view"]

_RECENT = 20  # steps that shown figures are averaged over


class _Recent:
    """Averages over the last steps."""

    def __init__(self) -> None:
        self._steps: deque[StepReport] = deque(maxlen=_RECENT)

    def add(self, report: StepReport) -> None:
        self._steps.append(report)

    def mean(self, name: str) -> float:
        """Mean of a figure."""
        values = [getattr(report.figures, name) for report in self._steps]
        return float(sum(values) / len(values))

    def acceptance(self) -> list[float]:
        """Mean acceptance at every depth."""
        columns = zip(*(report.figures.acceptance for report in self._steps), strict=True)
        return [sum(column) / len(column) for column in columns]

    def speed(self) -> float:
        """Response tokens a second."""
        return sum(r.responses for r in self._steps) / sum(r.seconds for r in self._steps)

    def left(self) -> float:
        """Seconds that the other steps will take."""
        last = self._steps[-1]
        pace = sum(report.seconds for report in self._steps) / len(self._steps)
        return pace * (last.total - last.step)


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


class _Lines(SilentReporter):
    """A line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._recent = _Recent()

    def step(self, report: StepReport) -> None:
        """Print the first steps, then every tenth."""
        self._recent.add(report)
        if report.is_skipped:
            self.note(f"step {report.step}: not finite, skipped")
        elif report.step <= 3 or report.step % 10 == 0 or report.step == report.total:
            recent = self._recent
            self.note(
                f"step {report.step} of {report.total}: loss {recent.mean('loss'):.4f}, "
                f"tau {recent.mean('tau_greedy'):.3f}, acceptance "
                + " ".join(f"{value:.2f}" for value in recent.acceptance())
                + f", {recent.speed():.0f} tok/s, {_clock(recent.left())} left"
            )

    def validation(self, report: ValidationReport) -> None:
        """Print what the held-out answers say."""
        figures = report.figures
        self.note(
            f"held out at step {report.step}: loss {figures.loss:.4f}, tau "
            f"{figures.tau_greedy:.3f} greedy, {figures.tau_sampling:.3f} sampling"
            + (", the best so far" if report.is_best else "")
        )

    def note(self, text: str) -> None:
        """Print a line."""
        ui.print_note(self._console, text)


class _Live(_Lines):
    """A table that is redrawn; validations stay as lines above it."""

    def __init__(self, console: Console, live: Live) -> None:
        super().__init__(console)
        self._live = live

    def step(self, report: StepReport) -> None:
        """Redraw the table."""
        self._recent.add(report)
        self._live.update(self._table(report))

    def _table(self, report: StepReport) -> Table:
        from rich.table import Table

        recent = self._recent
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        cells = {
            "step": f"{report.step} of {report.total}",
            "loss": f"{recent.mean('loss'):.4f}",
            "tau": f"{recent.mean('tau_greedy'):.3f}",
            "acceptance": " ".join(f"{value:.2f}" for value in recent.acceptance()),
            "tok/s": f"{recent.speed():.0f}",
            "left": _clock(recent.left()),
        }
        for name in cells:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_row(*cells.values())
        return table


@contextmanager
def open_view(console: Console, *, is_quiet: bool) -> Iterator[Reporter]:
    """Show a run while the block runs.

    Args:
        console: Where.
        is_quiet: Show nothing.

    Yields:
        Where to report.
    """
    if is_quiet:
        yield SilentReporter()
    elif console.is_terminal:
        from rich.live import Live

        with Live(console=console, auto_refresh=False) as live:
            view = _Live(console, live)
            yield view
    else:
        yield _Lines(console)
