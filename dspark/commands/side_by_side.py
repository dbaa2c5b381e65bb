"""The same prompt twice, plainly and with the draft, shown side by side as the tokens come.

The two run one after the other, so that neither slows the other down, plain decoding first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dspark.request import FinishReason, GenerationResult, Prompt, SamplingParams

if TYPE_CHECKING:
    from dspark.engine import Engine

__all__ = ["decoding_speed", "show_both"]

_NARROW = 80  # columns of a terminal below which the panes stand one above the other
_REFRESH = 12  # a second


def decoding_speed(results: list[GenerationResult]) -> float:
    """Output tokens per second after the first token, over all results."""
    stats = [result.stats for result in results]
    seconds = sum(s.seconds_draft + s.seconds_verify + s.seconds_rest for s in stats)
    return sum(s.committed for s in stats) / seconds if seconds > 0 else 0.0


class _Pane:
    """One of the two: its text so far and its figures."""

    def __init__(self, title: str) -> None:
        self._title = title
        self.text = Text()
        self.note = "waiting"

    def add(self, piece: str, *, is_drafted: bool) -> None:
        self.text.append(piece, style="green" if is_drafted else "")

    def finish(self, result: GenerationResult) -> None:
        speed = decoding_speed([result])
        stats = result.stats
        self.note = f"{len(result.token_ids)} tokens, {speed:.1f} tok/s"
        if stats.proposed:
            self.note += f", tau {stats.accepted_length:.2f}"

    def render(self) -> Panel:
        return Panel(self.text, title=self._title, subtitle=self.note, title_align="left")


class _View:
    """Both panes, laid out anew for every frame."""

    def __init__(self, panes: tuple[_Pane, _Pane], width: int) -> None:
        self._panes, self._is_narrow = panes, width < _NARROW

    def __rich__(self) -> RenderableType:
        grid = Table.grid(expand=True)
        left, right = (pane.render() for pane in self._panes)
        if self._is_narrow:
            grid.add_column()
            grid.add_row(left)
            grid.add_row(right)
        else:
            grid.add_column(ratio=1)
            grid.add_column(ratio=1)
            grid.add_row(left, right)
        return grid


def show_both(
    engine: Engine, prompt: Prompt, params: SamplingParams, console: Console
) -> list[GenerationResult]:
    """Decode a prompt plainly, then with the draft, and show both.

    Args:
        engine: With the draft.
        prompt: The prompt.
        params: How to sample; one sample.
        console: Where to show it. On a terminal the text comes as it is made.

    Returns:
        The plain result and the speculative one; one of them alone if Ctrl-C ended it.
    """
    panes = (_Pane("plain decoding"), _Pane(f"draft {engine.drafter.name}"))
    results: list[GenerationResult] = []
    with _live(_View(panes, console.width), console):
        for pane, drafts in zip(panes, (False, True), strict=True):
            seed = results[0].seed if results else params.seed
            own = replace(params, draft=drafts and params.draft, seed=seed)
            results.append(_follow(engine, prompt, own, pane))
            pane.finish(results[-1])
            if results[-1].finish_reason is FinishReason.CANCELLED:
                break
    return results


@contextmanager
def _live(view: _View, console: Console) -> Iterator[None]:
    if not console.is_terminal:
        yield
        console.print(view)
        return
    with Live(view, console=console, refresh_per_second=_REFRESH) as live:
        yield
        live.vertical_overflow = "visible"  # the last frame stays whole, however long it is


def _follow(
    engine: Engine, prompt: Prompt, params: SamplingParams, pane: _Pane
) -> GenerationResult:
    (request,) = engine.submit(prompt, params)
    start, tokens = time.perf_counter(), 0
    try:
        for chunk in engine.follow(request):
            for piece in chunk.pieces:
                pane.add(piece.text, is_drafted=piece.is_drafted)
            tokens += len(chunk.token_ids)
            pane.note = f"{tokens} tokens, {time.perf_counter() - start:.1f} s"
    except KeyboardInterrupt:
        engine.cancel(request)
    return request.result()
