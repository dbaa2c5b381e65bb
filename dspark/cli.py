"""The `dspark` command: app, error handling, exit codes.

Exit codes: 0 done, 1 a bug of ours, 2 bad input or a model that cannot be used, 3 a check that ran
found something, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dspark._version import __version__
from dspark.commands import audit, chat, convert, doctor, generate, models, plan, profile, report
from dspark.commands import eval as eval_commands
from dspark.commands.bench import bench_command
from dspark.commands.calibrate import calibrate_command
from dspark.commands.console import print_error, stderr_console
from dspark.commands.convert_draft import convert_draft_command
from dspark.commands.corpus import corpus_command
from dspark.commands.data import data_command
from dspark.commands.serve import serve
from dspark.commands.simulate import simulate
from dspark.commands.train import train
from dspark.errors import DataError, DsparkError

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """The commands, and what happens when their output cannot be written."""

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
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("convert")(convert.convert)
app.command("convert-draft")(convert_draft_command)
app.command("plan")(plan.plan)
app.command("audit")(audit.audit)
app.command("eval")(eval_commands.eval_command)
app.command("data")(data_command)
app.command("corpus")(corpus_command)
app.command("bench")(bench_command)
app.command("profile")(profile.profile)
app.command("serve")(serve)
app.command("simulate")(simulate)
app.command("doctor")(doctor.doctor)
app.command("report")(report.report)
app.command("train")(train)
app.command("calibrate")(calibrate_command)
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
        print_error(console, exc.message, exc.hint)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _drop_output() -> None:
    """Make Python's own flush at exit succeed."""
    with contextlib.suppress(OSError, ValueError):  # a stand-in for stdout has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
