"""What stands on a report's page, whatever it is rendered to.

All texts are plain: a renderer escapes them. The only markup is a chart's SVG, which
`dspark.eval.report.svg` makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

__all__ = [
    "Cell",
    "Chart",
    "DataFile",
    "Headline",
    "Page",
    "Row",
    "Section",
    "Series",
    "Table",
    "Term",
    "Tone",
    "printable",
]


class Tone(StrEnum):
    """How a text is tinted; what it says is in its words, too."""

    PLAIN = ""
    GOOD = "good"
    BAD = "bad"
    DOUBT = "doubt"


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell with a tint."""

    text: str
    tone: Tone = Tone.PLAIN


Row: TypeAlias = Sequence["str | Cell"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table.

    Attributes:
        title: What it holds.
        columns: Heads, units included.
        rows: One cell per column each.
        texts: Columns that hold text; the others hold numbers.
        groups: Heads over columns, (head, columns under it), from the left; empty for none.
        note: A sentence below it, or "".
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Row]
    texts: frozenset[int] = frozenset({0})
    groups: tuple[tuple[str, int], ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A legend's entry.

    Attributes:
        label: What it is.
        style: Index of its colour, marker and dash, from 0.
    """

    label: str
    style: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A chart.

    Attributes:
        title: What it shows.
        draw: Makes `svg`, for a page that shows it: drawing takes longer than all else.
        legend: Its series; empty if there is one that the title names.
        note: A sentence below it, or "".
    """

    title: str
    draw: Callable[[], str]
    legend: tuple[Series, ...] = ()
    note: str = ""

    @property
    def svg(self) -> str:
        """SVG markup with texts as text, free of ids that another chart has."""
        return self.draw()


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section.

    Attributes:
        name: Its heading, and its anchor in lower case.
        text: Paragraphs at its top.
        charts: Charts.
        tables: Tables.
    """

    name: str
    text: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One result that the page opens with.

    Attributes:
        subject: What it is about.
        figure: The figure itself, short.
        text: What it means, with interval and conditions.
        tone: Tint of the figure.
    """

    subject: str
    figure: str
    text: str
    tone: Tone = Tone.PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A definition."""

    name: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A result file, embedded.

    Attributes:
        label: Its letter.
        name: Its file name.
        kind: What it is, such as "bench".
        created: When it was made, or "".
        raw: Its JSON.
    """

    label: str
    name: str
    kind: str
    created: str
    raw: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A report.

    Attributes:
        title: Its title.
        subtitle: When, by what.
        warnings: What a reader must know before any figure.
        headlines: The results in a few lines.
        sections: What follows.
        terms: Definitions.
        files: The result files.
    """

    title: str
    subtitle: str
    warnings: tuple[str, ...] = ()
    headlines: tuple[Headline, ...] = ()
    sections: tuple[Section, ...] = ()
    terms: tuple[Term, ...] = ()
    files: tuple[DataFile, ...] = field(default=())


def printable(text: str) -> str:
    """A text on one line, with a mark for characters that cannot be shown.

    Control characters, lone surrogates and marks that turn the direction of writing come out as
    U+FFFD: none of them may act on the page.
    """
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\ufffd" for c in line)
