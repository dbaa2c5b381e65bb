"""The `dspark` command: app, error handling, exit codes.

A command's module is imported when the command is run or its help is asked for, not before.

Exit codes: 0 done, 1 a bug of ours, 2 bad input or a model that cannot be used, 3 a check that ran
found something, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Annotated, Any, cast

import typer
import typer.main
from typer.core import TyperGroup

from dspark._version import __version__
from dspark.errors import DataError, DsparkError

__all__ = ["app", "main"]

_SOURCES = {
    "generate": "generate:generate",
    "chat": "chat:chat",
    "convert": "convert:convert",
    "convert-draft": "convert_draft:convert_draft_command",
    "plan": "plan:plan",
    "audit": "audit:audit",
    "eval": "eval:eval_command",
    "data": "data:data_command",
    "corpus": "corpus:corpus_command",
    "bench": "bench:bench_command",
    "profile": "profile:profile",
    "serve": "serve:serve",
    "simulate": "simulate:simulate",
    "doctor": "doctor:doctor",
    "report": "report:report",
    "train": "train:train",
    "calibrate": "calibrate:calibrate_command",
    "models": "models:app",
}
"""Command: its module in dspark.commands, and there a function or an app with its own commands."""

_SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_show_locals": False,
    "rich_markup_mode": None,
}


@cache
def _make_command(name: str) -> Any:
    """Import a command and let Typer make its parser."""
    module, attribute = _SOURCES[name].split(":")
    found = getattr(import_module(f"dspark.commands.{module}"), attribute)
    holder = typer.Typer(**_SETTINGS)
    if isinstance(found, typer.Typer):
        holder.add_typer(found, name=name)
    else:
        holder.command(name)(found)
    return typer.main.get_group(holder).commands[name]


class _Catalogue(Mapping[str, Any]):
    """All commands by name, each made when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        if name not in _SOURCES:
            raise KeyError(name)
        return _make_command(name)

    def __contains__(self, name: object) -> bool:
        return name in _SOURCES

    def __iter__(self) -> Iterator[str]:
        return iter(_SOURCES)

    def __len__(self) -> int:
        return len(_SOURCES)


class _Commands(TyperGroup):
    """The commands, and what happens when their output cannot be written."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = cast(Any, _Catalogue())

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands, none of which is imported for that."""
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        """Run a command and write out what it printed."""
        try:
            value = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            _drop_output()  # its reader has gone, which is no error
            raise typer.Exit(0) from None
        except OSError as exc:
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _drop_output()
            raise DataError("the output cannot be written: no space left on the device.") from exc
        return value


app = typer.Typer(
    name="dspark",
    cls=_Commands,
    help="Lossless tree-speculative decoding: the same text, sooner.",
    no_args_is_help=True,
    **_SETTINGS,
)


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
    if "_DSPARK_COMPLETE" in os.environ:  # a shell asks how a line may go on
        from typer.completion import completion_init

        completion_init()
    try:
        app(standalone_mode=True, prog_name="dspark")
    except DsparkError as exc:
        from dspark.commands.console import print_error, stderr_console

        print_error(stderr_console(), exc.message, exc.hint)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _drop_output() -> None:
    """Make Python's own flush at exit succeed."""
    with contextlib.suppress(OSError, ValueError):  # a stand-in for stdout has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
