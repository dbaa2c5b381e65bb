"""`dspark train`: train a draft module for a target."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from dspark.commands import console as ui
from dspark.commands.console import DeviceOption, ThreadsOption
from dspark.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from dspark.training.progress import Reporter
    from dspark.training.recipe import Recipe
    from dspark.training.setup import Setup
    from dspark.training.trainer import Outcome, Trainer

__all__ = ["train"]

RESUMES = ("auto", "must", "never")
INTERRUPTED, TIME_IS_UP = "interrupted", "time is up"


def train(  # noqa: PLR0913 - one parameter per option is how Typer works
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file.")],
    out: Annotated[str, typer.Option("--out", help="The run's folder: checkpoints, log, draft.")],
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            help="auto (go on if there is a checkpoint), must, or never (refuse a folder that "
            "holds a run).",
        ),
    ] = "auto",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value, in place of the recipe's (repeatable)."),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option("--max-minutes", min=0, help="Stop after this long, with a checkpoint."),
    ] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no notes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Train a draft module for a target; a stopped run goes on where it was."""
    from dspark.training.recipe import read_recipe

    if resume not in RESUMES:
        raise ConfigError(f"--resume is {resume!r}, but must be one of {', '.join(RESUMES)}.")
    began = time.monotonic()
    resolved = read_recipe(recipe, changes or ())
    folder = Path(out).expanduser()
    _check_folder(folder, resume)
    console = ui.stderr_console()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from dspark.training.memory import keep_freed_memory
    from dspark.training.setup import prepare
    from dspark.training.trainer import Trainer
    from dspark.training.world import open_world

    keep_freed_memory()
    with open_world(device) as world:
        is_quiet = quiet or not world.is_first
        _print_recipe(console, resolved, is_quiet=is_quiet)
        with ui.loading(console, f"loading {resolved.target}"):
            setup = prepare(resolved, device=device, world=world)
        with _reporter(console, setup, folder, is_quiet=is_quiet) as reporter:
            trainer = Trainer(setup, folder, reporter=reporter, world=world)
            if not is_quiet:
                _say_start(reporter, setup, trainer)
            with _interrupts(reporter) as was_interrupted:
                outcome = trainer.run(_stopper(was_interrupted, began, max_minutes))
    if world.is_first:
        _say_end(console, outcome, folder, is_quiet=quiet, as_json=as_json)
    if outcome.reason == INTERRUPTED:
        raise typer.Exit(130)


def _print_recipe(console: Console, recipe: Recipe, *, is_quiet: bool) -> None:
    for line in () if is_quiet else recipe.lines():
        ui.print_note(console, line)


def _check_folder(folder: Path, resume: str) -> None:
    from dspark.training.checkpoints import latest_checkpoint

    found = latest_checkpoint(folder)
    if resume == "must" and found is None:
        raise ConfigError(f"{folder} holds no checkpoint to go on from.")
    if resume == "never" and found is not None:
        raise ConfigError(
            f"{folder} holds a run, up to {found.name}.",
            hint="name another --out folder, or leave out --resume",
        )


def _say_start(reporter: Reporter, setup: Setup, trainer: Trainer) -> None:
    module, samples = setup.module, setup.samples
    size = sum(parameter.numel() for parameter in module.parameters())
    responses = sum(sample.length - sample.start for sample in samples.train)
    reporter.note(
        f"{size / 1e6:.2f} M parameters, {len(samples.train)} answers with {responses} tokens, "
        f"{len(samples.validation)} held out, {trainer.total} steps, computing in "
        f"{str(setup.dtype).removeprefix('torch.')}"
    )


@contextmanager
def _reporter(
    console: Console, setup: Setup, folder: Path, *, is_quiet: bool
) -> Iterator[Reporter]:
    from dspark.commands.train_view import open_view
    from dspark.training.tensorboard import with_tensorboard

    with (
        open_view(console, is_quiet=is_quiet) as view,
        with_tensorboard(view, folder, is_on=setup.recipe.run.tensorboard) as reporter,
    ):
        yield reporter


@contextmanager
def _interrupts(reporter: Reporter) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and a request to terminate wait for the end of the step; a second one does not."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        reporter.note("stopping after this step; once more stops at once")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopper(
    was_interrupted: Callable[[], bool], began: float, max_minutes: float | None
) -> Callable[[], str | None]:
    def should_stop() -> str | None:
        if was_interrupted():
            return INTERRUPTED
        if max_minutes is not None and time.monotonic() - began > 60 * max_minutes:
            return TIME_IS_UP
        return None

    return should_stop


def _say_end(
    console: Console, outcome: Outcome, folder: Path, *, is_quiet: bool, as_json: bool
) -> None:
    if as_json:
        print(json.dumps({**asdict(outcome), "is_done": outcome.is_done, "out": str(folder)}))
        sys.stdout.flush()
    if not outcome.is_done:
        ui.print_note(
            console,
            f"{outcome.reason} after step {outcome.step} of {outcome.total}; "
            "run the same command again to go on",
        )
    elif not is_quiet:
        ui.print_note(console, f"done: {outcome.step} steps, {outcome.skipped} skipped")
        best = "best" if outcome.best_step is not None else "last"
        ui.print_note(console, f"the draft: --draft {folder / best}")
