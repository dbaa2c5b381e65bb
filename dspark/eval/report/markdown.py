"""A report as Markdown: everything but the charts, whose figures are in tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from dspark.eval.report.page import Cell, Page, Section, Table, printable

__all__ = ["render_markdown"]

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!$])")


def render_markdown(page: Page) -> str:
    """The page as Markdown; no text of a result file acts as markup."""
    return "\n".join(_lines(page)) + "\n"


def _lines(page: Page) -> Iterator[str]:
    yield f"# {_plain(page.title)}"
    if page.subtitle:
        yield from ("", _plain(page.subtitle))
    for text in page.warnings:
        yield from ("", f"> **Not comparable.** {_plain(text)}")
    if page.headlines:
        yield ""
    for item in page.headlines:
        line = f"- **{_plain(item.subject)}**: {_plain(item.figure)} {_plain(item.text)}"
        yield line
    for section in page.sections:
        yield from _section(section)
    yield from ("", "## Definitions", "")
    for term in page.terms:
        yield f"- **{_plain(term.name)}**: {_plain(term.meaning)}"
    yield from ("", "## Data", "")
    for file in page.files:
        made = f", {file.created}" if file.created else ""
        yield f"- {file.label}: {_plain(f'{file.name}, dspark {file.kind}{made}')}"


def _section(section: Section) -> Iterator[str]:
    yield from ("", f"## {_plain(section.name)}")
    for text in section.text:
        yield from ("", _plain(text))
    for table in section.tables:
        yield from _table(table)


def _table(table: Table) -> Iterator[str]:
    yield from ("", f"### {_plain(table.title)}", "")
    over = [head for head, width in table.groups for _ in range(width)]
    over += [""] * (len(table.columns) - len(over))
    yield _row([f"{head} {name}".strip() for head, name in zip(over, table.columns, strict=True)])
    marks = ("---" if at in table.texts else "---:" for at in range(len(table.columns)))
    yield f"| {' | '.join(marks)} |"
    for row in table.rows:
        yield _row(row)
    if table.note:
        yield from ("", _plain(table.note))


def _row(cells: Sequence[str | Cell]) -> str:
    texts = (_plain(cell.text if isinstance(cell, Cell) else cell) for cell in cells)
    return f"| {' | '.join(texts)} |"


def _plain(text: str) -> str:
    """A text on one line in which no character is markup."""
    return _SPECIAL.sub(r"\\\1", printable(text)).replace("&", "&amp;")
