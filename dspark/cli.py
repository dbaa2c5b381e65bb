"""The `dspark` command: app, error handling, exit codes.

Exit codes: 0 done, 1 a bug of ours, 2 bad input or a model that cannot be used, 3 a check that ran
found something, 130 Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from dspark._version import __version__
from dspark.commands import chat, generate, models
from dspark.commands.console import stderr_console
from dspark.errors import DsparkError

__all__ = ["app", "main"]

app = typer.Typer(
    name="dspark",
    help="Lossless tree-speculative decoding: the same text, sooner.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.add_typer(models.app, name="models")


def _show_version(value: bool) -> None:
    if value:
        print(f"dspark {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log what happens, to stderr.")
    ] = False,
) -> None:
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", stream=sys.stderr)


def main() -> None:
    """Run the command line; turn our errors into one sentence and an exit code."""
    try:
        app(standalone_mode=True)
    except DsparkError as exc:
        console = stderr_console()
        console.print(f"[bold red]error:[/] {_escape(exc.message)}")
        if exc.hint:
            console.print(f"[bold]hint:[/] {_escape(exc.hint)}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of our output has gone; Python's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
