"""`dspark profile`: how long a step takes on this machine, by rows and context."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark.commands import console as ui
from dspark.commands.console import (
    DeviceOption,
    DtypeOption,
    ExactOption,
    ExpertMemoryOption,
    QuantOption,
    TargetOption,
    ThreadsOption,
)
from dspark.commands.plan import parse_tokens
from dspark.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from dspark.engine import Engine
    from dspark.eval.profile import Profile, ProfilePoint
    from dspark.eval.profile_measure import ProfileConfig

__all__ = ["profile"]


def profile(  # noqa: PLR0913 - one parameter per option is how Typer works
    target: TargetOption = "smollm2-135m",
    rows: Annotated[
        str | None, typer.Option("--rows", help="Row counts, such as 1,2,4,8,16,32.")
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(
            "--contexts", help="Context lengths in tokens, such as 128,2K (default: 128,512,2K)."
        ),
    ] = None,
    per_request: Annotated[
        int, typer.Option("--per-request", help="Rows of a request at the most, 1 to 32.")
    ] = 16,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed steps of each point.")] = 7,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few points in two seconds; nothing is kept.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print what was measured before, and measure nothing.")
    ] = False,
    dtype: DtypeOption = "auto",
    quant: QuantOption = "none",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    exact: ExactOption = None,
    expert_memory: ExpertMemoryOption = None,
    plot: Annotated[
        str | None, typer.Option("--plot", help="Draw the curve into this .svg or .png file.")
    ] = None,
    sglang: Annotated[
        str | None,
        typer.Option("--sglang", help="Write the curve of one context as SGLang's SPS table."),
    ] = None,
    sglang_context: Annotated[
        str | None,
        typer.Option("--sglang-context", help="Which context (default: the longest)."),
    ] = None,
    from_sglang: Annotated[
        str | None,
        typer.Option("--from-sglang", help="Read SGLang's SPS table instead of measuring."),
    ] = None,
    requests: Annotated[
        int, typer.Option("--requests", help="Requests to read an additive SGLang table at.")
    ] = 1,
    out: Annotated[
        str | None, typer.Option("--out", help="Write the profile as JSON to this file.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no notes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON.")] = False,
) -> None:
    """Measure how many verification steps a second the target makes, by rows in the batch."""
    from dspark.eval.profile_measure import ROWS, ProfileConfig
    from dspark.eval.profile_sglang import from_sglang as read_sglang

    config = ProfileConfig(
        contexts=None if contexts is None else _numbers("--contexts", contexts),
        rows=ROWS if rows is None else _numbers("--rows", rows),
        rows_per_request=per_request,
        repeats=repeats,
    )
    chosen = None if sglang_context is None else _numbers("--sglang-context", sglang_context)[0]
    _check_files(plot, sglang, out)
    console = ui.stderr_console()
    if from_sglang is not None:
        found = read_sglang(from_sglang, requests=requests)
    else:
        engine = ui.load_engine(
            console,
            target=target,
            draft="none",
            dtype=dtype,
            quant=quant,
            device=device,
            threads=threads,
            exact=exact,
            expert_memory=expert_memory,
        )
        memory = _bytes(expert_memory)
        if show:
            found = _kept(engine, memory)
        elif quick:
            found = _quick(engine)
        else:
            found = _measure(console, engine, config, memory, is_quiet=quiet)
    _write(console, found, plot=plot, sglang=sglang, context=chosen, out=out, is_quiet=quiet)
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False, allow_nan=False))
    else:
        _print(found)
    if found.is_interrupted:
        raise typer.Exit(130)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(parse_tokens(part) for part in text.split(","))
    except ConfigError as exc:
        raise ConfigError(
            f"{option} is {text!r}, but must be numbers, such as 128,512,2K."
        ) from exc


def _bytes(memory: str | None) -> int | None:
    from dspark.models.text import parse_bytes

    return None if memory is None else parse_bytes(memory)


def _check_files(plot: str | None, *others: str | None) -> None:
    """Refuse what cannot be written before time is spent."""
    from dspark.eval.profile_plot import check_plot

    if plot is not None:
        check_plot(plot)
    for path in (plot, *others):
        if path is not None and not Path(path).expanduser().absolute().parent.is_dir():
            raise DataError(f"{path} cannot be written: there is no such folder.")


def _kept(engine: Engine, memory: int | None) -> Profile:
    from dspark.eval.profile_store import load_profile

    found = load_profile(engine.target, expert_memory=memory)
    if found is None:
        raise DataError(
            f"{engine.target.info.name} has no profile yet, as it is loaded here.",
            hint="run the same command without --show",
        )
    return found


def _quick(engine: Engine) -> Profile:
    from dspark.eval.profile_measure import quick_profile

    return quick_profile(engine.target, codec=engine.codec)


def _measure(
    console: Console,
    engine: Engine,
    config: ProfileConfig,
    memory: int | None,
    *,
    is_quiet: bool,
) -> Profile:
    from dspark.eval.profile_measure import measure_profile
    from dspark.eval.profile_store import keep_profile

    with _progress(console, is_on=not is_quiet) as report:
        found = measure_profile(
            engine.target, config, codec=engine.codec, expert_memory=memory, on_progress=report
        )
    if found.is_interrupted:
        ui.print_note(console, "interrupted: what was measured follows, and is not kept")
        return found
    path = keep_profile(found)
    if not is_quiet:
        ui.print_note(console, f"kept in {path}" if path else "it could not be kept for later")
    return found


@contextmanager
def _progress(console: Console, *, is_on: bool) -> Iterator[Callable[[float, float], None] | None]:
    """A bar with the time left on a terminal; nothing elsewhere."""
    with ui.time_left_bar(console, is_on=is_on) as bar:
        if bar is None:
            yield None
            return
        task = bar.add_task("measuring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _write(
    console: Console,
    found: Profile,
    *,
    plot: str | None,
    sglang: str | None,
    context: int | None,
    out: str | None,
    is_quiet: bool,
) -> None:
    from dspark.eval.profile_plot import plot_profile
    from dspark.eval.profile_sglang import rising_steps, to_sglang, write_sglang
    from dspark.eval.results import write_results

    if out is not None:
        write_results(out, found.to_json())
    if plot is not None:
        plot_profile(found, plot)
    if sglang is None:
        return
    write_sglang(sglang, found, context)
    rising = rising_steps(to_sglang(found, context))
    if rising and not is_quiet:
        ui.print_note(
            console,
            f"steps get over 10 % faster at {', '.join(map(str, rising))} rows, which SGLang takes "
            "at its word: measure these again with more --repeats",
        )


# -- what a person sees -----------------------------------------------------------------------


def _print(found: Profile) -> None:
    if not sys.stdout.isatty():
        _print_plain(found)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for line in _heads(found):
        console.print(Text(line))
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("rows", justify="right", no_wrap=True)
    for context in found.contexts:
        label = f"context {context}" if context else "context not stated"
        table.add_column(label, justify="right", no_wrap=True)
    if found.experts:
        table.add_column("experts", justify="right", no_wrap=True)
    for cells in _cells(found):
        table.add_row(*cells)
    console.print(table)


def _print_plain(found: Profile) -> None:
    """Tab-separated: one line a point."""
    names = ("context", "rows", "requests", "steps_per_second", "seconds", "low", "high", "repeats")
    print("\t".join(names))
    for point in found.points:
        seconds = (point.median, point.low, point.high)
        cells = [
            str(point.context),
            str(point.rows),
            str(point.requests),
            f"{1 / point.median:.3f}",
        ]
        print("\t".join([*cells, *(f"{value:.6f}" for value in seconds), str(point.repeats)]))


def _heads(found: Profile) -> Iterator[str]:
    key, model = found.key, found.header.get("target")
    if key.threads:
        name = model["id"] if isinstance(model, dict) else key.target[:12]
        plural = "s" if key.threads > 1 else ""
        yield (
            f"{name}, {key.dtype}, {key.device}, {key.threads} thread{plural}, "
            f"exact mode {'on' if key.exact else 'off'}"
        )
    yield "steps per second; median time of a step, half the range between its quartiles;"
    yield "how many steps of the fewest rows it takes as long as"


def _cells(found: Profile) -> Iterator[list[str]]:
    experts = {count.rows: count.distinct_experts for count in found.experts or ()}
    first = {context: found.curve(context)[0] for context in found.contexts}
    for rows in found.rows:
        cells = [str(rows)]
        for context in found.contexts:
            point = next((p for p in found.curve(context) if p.rows == rows), None)
            cells.append("-" if point is None else _cell(point, first[context]))
        if found.experts:
            cells.append(f"{experts[rows]:.1f}" if rows in experts else "-")
        yield cells


def _cell(point: ProfilePoint, first: ProfilePoint) -> str:
    spread = 50 * (point.high - point.low) / point.median
    return (
        f"{_digits(1 / point.median)}/s {_digits(1000 * point.median):>5} ms ±{spread:<2.0f}% "
        f"{point.median / first.median:5.2f}x"
    )


def _digits(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
