"""`dspark report`: results on one page."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark.commands import console as ui
from dspark.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["report"]


def report(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILES", help="Results of eval, bench, profile, simulate, audit."),
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", help="Write the page here (default: report.html by the first file)."),
    ] = None,
    markdown: Annotated[
        str | None, typer.Option("--markdown", help="Write it as Markdown, too, without charts.")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="The page's title.")] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Show results together though machine or settings differ."),
    ] = False,
) -> None:
    """Put results on one page that needs no network: figures, tables, charts, definitions, data.

    Two files of one kind are compared, if machine and settings are the same.
    """
    console = ui.stderr_console()
    page_path = Path(out).expanduser() if out is not None else _beside(files[0])
    targets = [page_path, *([] if markdown is None else [Path(markdown).expanduser()])]
    _check_targets(targets, files)
    with ui.loading(console, "drawing the report"):
        try:
            from dspark.eval.report import build_page, render_html, render_markdown
        except ModuleNotFoundError as exc:  # pydantic; the others are asked for where they serve
            raise ConfigError(
                f"a report needs {exc.name}, which is not installed.",
                hint="pip install 'dspark[report]'",
            ) from exc

        page = build_page(files, title=title, is_forced=force)
        texts = [render_html(page)]
        if markdown is not None:
            texts.append(render_markdown(page))
    for text in page.warnings:
        ui.print_note(console, f"warning: {text}")
    for path, content in zip(targets, texts, strict=True):
        _write(console, path, content)


def _beside(path: str) -> Path:
    return Path(path).expanduser().parent / "report.html"


def _check_targets(targets: list[Path], files: list[str]) -> None:
    """Refuse to write over a result, or both forms of the report to one file."""
    sources = [Path(path).expanduser().resolve() for path in files]
    for path in targets:
        if path.resolve() in sources:
            raise ConfigError(f"the report cannot be written to {path}: it is one of the results.")
        if not path.absolute().parent.is_dir():
            raise DataError(f"the report cannot be written to {path}: there is no such folder.")
    if len({path.resolve() for path in targets}) < len(targets):
        raise ConfigError(f"--out and --markdown are the same file, {targets[0]}.")


def _write(console: Console, path: Path, text: str) -> None:
    """Write a file at once, and say where it is and whether another was there."""
    word = "replaced" if path.exists() else "wrote"
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DataError(f"the report cannot be written to {path}: {exc.strerror}.") from exc
    ui.print_note(console, f"{word} {path}")
