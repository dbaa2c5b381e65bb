"""The charts of a report: lines, dots with intervals, reliability.

Every chart is 400 pixels wide, which a phone shows nearly as it is. Its legend is the page's, not
the chart's. More series than there are styles are spread over several charts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dspark.eval.report.page import Chart, Series, printable
from dspark.eval.report.svg import COLORS, PAPER, SOFT, STYLES, new_figure, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Charts", "Frame", "Line", "Point"]

_LONGEST_LABEL = 22  # characters of a category beside a chart
_MANY_TICKS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of a line.

    Attributes:
        x: Where.
        y: The figure.
        low: Lower end of its interval, or None.
        high: Upper end.
        is_thin: True if little stands behind it; drawn hollow.
        text: What stands beside it, or "".
        weight: Share of the largest marker's area, in (0, 1].
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    is_thin: bool = False
    text: str = ""
    weight: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A series.

    Attributes:
        label: What the legend calls it.
        points: Its points, by x.
    """

    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What a chart's axes are.

    Attributes:
        x: Label of the horizontal axis, with its unit.
        y: Label of the vertical axis, with its unit.
        is_share: True if y is a share, shown in percent, from 0 to 100 or to what there is.
        is_square: True if x does so, too, with the diagonal drawn.
        is_log: True if x doubles from tick to tick.
        from_zero: True if y starts at 0.
        reference: A y that something is held against, and its name, or None.
        height: In pixels.
    """

    x: str
    y: str
    is_share: bool = False
    is_square: bool = False
    is_log: bool = False
    from_zero: bool = False
    reference: tuple[float, str] | None = None
    height: float = 250.0


class Charts:
    """Makes the charts of one page, so that their ids differ."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._styles: dict[str, int] = {}

    def lines(
        self, title: str, lines: Sequence[Line], frame: Frame, *, note: str = ""
    ) -> tuple[Chart, ...]:
        """Lines over a common axis.

        Args:
            title: What they show.
            lines: Series; those without points are left out.
            frame: The axes.
            note: A sentence below, or "".

        Returns:
            No chart without data, else one, or more where there are many series.
        """
        full = [line for line in lines if line.points]
        charts = []
        for part, name in _parts(full, title):
            legend = self._legend([line.label for line in part])
            own = {"prefix": f"chart{next(self._numbers)}", "title": name}
            draw = partial(_draw_lines, part, frame, legend, **own)
            charts.append(Chart(title=name, draw=draw, legend=legend, note=note))
        return tuple(charts)

    def dots(
        self,
        title: str,
        rows: Mapping[str, Mapping[str, Point]],
        *,
        x: str,
        reference: tuple[float, str],
        note: str = "",
    ) -> tuple[Chart, ...]:
        """A dot with its interval for every category and series.

        Args:
            title: What they show.
            rows: Series to category to figure (`y`; `x` is not used).
            x: Label of the axis, with its unit.
            reference: A value that the dots are held against, and its name.
            note: A sentence below, or "".

        Returns:
            As `lines`.
        """
        full = [(label, points) for label, points in rows.items() if points]
        names = list(dict.fromkeys(name for _, points in full for name in points))
        charts = []
        for part, title_of_part in _parts(full, title):
            legend = self._legend([label for label, _ in part])
            own = {"prefix": f"chart{next(self._numbers)}", "title": title_of_part}
            axis = partial(_frame_dots, names=names, x=x, reference=reference)
            draw = partial(_draw_rows, part, names, axis, legend, **own)
            charts.append(Chart(title=title_of_part, draw=draw, legend=legend, note=note))
        return tuple(charts)

    def _legend(self, labels: Sequence[str]) -> tuple[Series, ...]:
        """A style for each label: the one it has in the page's other charts where that is free."""
        used: set[int] = set()
        series = []
        for label in labels:
            style = self._styles.setdefault(label, len(self._styles) % len(STYLES))
            if style in used:
                style = min(set(range(len(STYLES))) - used)
            used.add(style)
            series.append(Series(label=label, style=style))
        return tuple(series)


def _parts(items: Sequence[Any], title: str) -> Iterator[tuple[Sequence[Any], str]]:
    """As many series at a time as there are styles, with a title each."""
    parts = [items[at : at + len(STYLES)] for at in range(0, len(items), len(STYLES))]
    for number, part in enumerate(parts, 1):
        yield part, title if len(parts) == 1 else f"{title}, {number} of {len(parts)}"


def _draw_lines(
    lines: Sequence[Line], frame: Frame, legend: Sequence[Series], *, prefix: str, title: str
) -> str:
    """The SVG of lines over a common axis."""
    with new_figure(frame.height) as figure:
        axes = figure.subplots()
        _frame(axes, frame, [point for line in lines for point in line.points])
        for line, series in zip(lines, legend, strict=True):
            _draw(axes, line, series.style)
        return svg_of(figure, prefix=prefix, title=title)


def _draw_rows(
    rows: Sequence[tuple[str, Mapping[str, Point]]],
    names: Sequence[str],
    axis: Callable[[Axes], None],
    legend: Sequence[Series],
    *,
    prefix: str,
    title: str,
) -> str:
    """The SVG of dots by category."""
    row = 14 + 12 * len(rows)  # pixels of a category
    with new_figure(66 + row * len(names)) as figure:
        axes = figure.subplots()
        axis(axes)
        for at, (_, points) in enumerate(rows):
            shift = 12 / row * (at - (len(rows) - 1) / 2)
            found = [(i + shift, points[n]) for i, n in enumerate(names) if n in points]
            _draw_dots(axes, found, legend[at].style)
        return svg_of(figure, prefix=prefix, title=title)


def _frame(axes: Axes, frame: Frame, points: Sequence[Point]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.set_xlabel(frame.x)
    axes.set_title(frame.y, loc="left", fontsize=12)  # reads easier than a turned label
    axes.grid(axis="both" if frame.is_square else "y")
    axes.margins(x=0.06, y=0.12)
    values = sorted({point.x for point in points})
    if frame.is_log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    if frame.is_square:
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, dashes=(4, 3), zorder=1)
        axes.set_xlim(-0.03, 1.03)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f}"))
    elif all(float(value).is_integer() for value in values) and len(values) <= _MANY_TICKS:
        axes.set_xticks(values, [f"{value:,.0f}" for value in values])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    if frame.is_share:
        most = max(point.y for point in points)
        top = 1.0 if frame.is_square or most > 0.5 else math.ceil(10 * most + 0.01) / 10
        axes.set_ylim(-0.03 * top, 1.03 * top)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f}"))
        return
    tops = [point.y if point.high is None else point.high for point in points]
    if frame.from_zero:
        axes.set_ylim(0, 1.12 * max(tops))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))
    if frame.reference is not None:
        value, name = frame.reference
        axes.axhline(value, color=SOFT, linewidth=1, zorder=1)
        axes.annotate(
            name,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=11,
        )


def _draw(axes: Axes, line: Line, style: int) -> None:
    color, (marker, dash) = COLORS[style], STYLES[style]
    points = line.points
    axes.plot([p.x for p in points], [p.y for p in points], color=color, linestyle=dash, zorder=2)
    for point in points:
        if point.low is not None and point.high is not None:
            axes.plot([point.x] * 2, [point.low, point.high], color=color, linewidth=1, zorder=2)
        size = 6.0 if point.weight is None else 2.5 + 8.5 * point.weight**0.5
        axes.plot(
            point.x,
            point.y,
            marker,
            color=color,
            markerfacecolor=PAPER if point.is_thin else color,
            markersize=size,
            zorder=3,
        )
        if point.text:
            axes.annotate(
                point.text,
                (point.x, point.y),
                xytext=(6, 4),
                textcoords="offset points",
                fontsize=11,
            )


def _frame_dots(axes: Axes, names: Sequence[str], *, x: str, reference: tuple[float, str]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    value, name = reference
    axes.set_xlabel(x)
    axes.set_yticks(range(len(names)), [_shortened(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))
    axes.axvline(value, color=SOFT, linewidth=1, zorder=1)
    axes.annotate(
        name,
        (value, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, 2),
        textcoords="offset points",
        fontsize=11,
    )


def _draw_dots(axes: Axes, points: Sequence[tuple[float, Point]], style: int) -> None:
    color, marker = COLORS[style], STYLES[style][0]
    for y, point in points:
        if point.low is not None and point.high is not None:
            axes.plot([point.low, point.high], [y, y], color=color, linewidth=1.4, zorder=2)
        face = PAPER if point.is_thin else color
        axes.plot(point.y, y, marker, color=color, markerfacecolor=face, zorder=3)


def _shortened(text: str) -> str:
    clean = printable(text)
    return clean if len(clean) <= _LONGEST_LABEL else clean[: _LONGEST_LABEL - 1] + "…"
