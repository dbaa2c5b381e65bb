"""Running a command's function in this process, as the command line would."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer
import typer.main


@functools.cache
def _parser(function: Callable[..., Any]) -> Any:
    """What Typer makes of the function, which takes it longer than many a test."""
    app = typer.Typer()
    app.command()(function)
    return typer.main.get_command(app)


def run_command(function: Callable[..., Any], *arguments: str) -> int:
    """The exit status. Errors of ours are raised."""
    try:
        return int(_parser(function)(list(arguments), standalone_mode=False) or 0)
    except typer.Exit as exc:
        return exc.exit_code
