"""What commands share: consoles, the options of an engine, tables of statistics."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from dspark.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

    from dspark.engine import Engine
    from dspark.loading import StepCosts
    from dspark.request import GenerationResult, RequestStats

__all__ = [
    "DeviceOption",
    "DraftOption",
    "DraftQuantOption",
    "DtypeOption",
    "EffortOption",
    "ExactOption",
    "ExpertMemoryOption",
    "GrammarOption",
    "JsonSchemaOption",
    "JsonWhitespaceOption",
    "QuantOption",
    "RegexOption",
    "TargetOption",
    "ThinkOption",
    "ThreadsOption",
    "loading",
    "precision",
    "print_error",
    "print_note",
    "print_stats",
    "read_line",
    "stderr_console",
    "time_left_bar",
]

TargetOption: TypeAlias = Annotated[
    str, typer.Option("--target", help="Alias, folder, .gguf file or hub id.")
]
DraftOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--draft",
        help="auto (the checkpoint's own draft, else one that comes with dspark, else lookup), "
        "none, lookup, lookup:FILE, a model, a draft module's folder, or one of these with "
        "+lookup.",
    ),
]
DtypeOption: TypeAlias = Annotated[
    str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
]
QuantOption: TypeAlias = Annotated[
    str,
    typer.Option("--quant", help="Round the target's weights: none, int8 or int4 (another model)."),
]
DraftQuantOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--draft-quant", help="Round the draft's weights: auto, none or int8 (speed only)."
    ),
]
DeviceOption: TypeAlias = Annotated[str, typer.Option("--device", help="auto, cpu, cuda ...")]
JsonSchemaOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--json-schema",
        metavar="FILE|TEXT",
        help="Answer with JSON that fits this schema.",
    ),
]
JsonWhitespaceOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--json-whitespace",
        help="With --json-schema: free, spaced (as json.dumps; fewer rounds) or compact.",
    ),
]
RegexOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--regex", help="Answer with what this expression matches from end to end."),
]
GrammarOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--grammar", metavar="FILE", help="Answer with a text of this Lark grammar."),
]
ExpertMemoryOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--expert-memory",
        help="Memory for routed experts, such as 32GiB; the others are read from disk as they "
        "are wanted (DeepSeek-V4).",
    ),
]
ThinkOption: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--think/--no-think", help="Think before answering (default: the model's choice)."
    ),
]
EffortOption: TypeAlias = Annotated[
    str | None, typer.Option("--effort", help="How hard to think: low, high or max (DeepSeek-V4).")
]
ThreadsOption: TypeAlias = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads.")
]
ExactOption: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--exact/--no-exact",
        help="Make speculative output bitwise that of plain decoding "
        "(default: on where the check at load finds that it is cheap).",
    ),
]


def stderr_console() -> Console:
    """The console for everything that is not the result."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_error(console: Console, message: str, hint: str | None = None) -> None:
    """Print an error as one line, and its hint as another."""
    from rich.markup import escape

    console.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}")
    if hint:
        console.print(f"[bold]hint:[/] {escape(hint)}")


def print_note(console: Console, text: str) -> None:
    """Print a line of lesser weight; brackets in it are no markup."""
    from rich.markup import escape

    console.print(f"[dim]{escape(text)}[/]")


@contextmanager
def loading(console: Console, text: str) -> Iterator[None]:
    """Show a spinner on a terminal while something loads; show nothing elsewhere."""
    if console.is_terminal:
        from rich.text import Text

        with console.status(Text(text)):
            yield
    else:
        yield


@contextmanager
def time_left_bar(
    console: Console, *, is_on: bool, counts: str | None = None
) -> Iterator[Progress | None]:
    """A bar with the time left on a terminal; None elsewhere.

    Args:
        console: The console.
        is_on: Show it.
        counts: What a step of the bar is, to show done and total and the time taken; the bar stays
            then when it is done.
    """
    if not is_on or not console.is_terminal:
        yield None
        return
    from rich import progress

    columns: list[ProgressColumn] = [
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
    ]
    if counts is not None:
        columns += [
            progress.TextColumn(f"{{task.completed:.0f}} of {{task.total:.0f}} {counts}"),
            progress.TimeElapsedColumn(),
        ]
    columns += [progress.TextColumn("left"), progress.TimeRemainingColumn()]
    with progress.Progress(*columns, console=console, transient=counts is None) as bar:
        yield bar


def load_engine(  # noqa: PLR0913 - the options that commands share
    console: Console,
    *,
    target: str,
    draft: str,
    dtype: str,
    device: str,
    threads: int | None,
    exact: bool | None,
    quant: str = "none",
    draft_quant: str = "auto",
    expert_memory: str | None = None,
    think: bool | None = None,
    effort: str | None = None,
    auto_off: bool = True,
    has_costs: bool = False,
) -> Engine:
    """Fetch (with a progress bar of its own), then load with a spinner.

    With `has_costs` the engine knows what steps cost from a profile; one is measured if none is
    kept.
    """
    from dspark.models.resolve import resolve_model

    resolve_model(target)
    with loading(console, f"loading {target}"):
        from dspark.engine import Engine, EngineConfig

        return Engine.load(
            target=target,
            draft=draft,
            dtype=dtype,
            device=device,
            threads=threads,
            exact=exact,
            quant=quant,
            draft_quant=draft_quant,
            expert_memory=expert_memory,
            think=think,
            effort=effort,
            config=EngineConfig(auto_off=auto_off),
            step_costs=_step_costs(console) if has_costs else None,
        )


def _step_costs(console: Console) -> StepCosts:
    """A kept profile or a quick one, with a note on a terminal when it is measured."""
    from dspark.eval.profile_auto import kept_or_quick

    if not console.is_terminal:
        return kept_or_quick
    return partial(kept_or_quick, note=partial(print_note, console))


def precision(dtype: str, quant: str = "none") -> str:
    """A target's dtype, and what its weights were rounded to if they were."""
    return dtype if quant == "none" else f"{dtype}, {quant} weights"


def read_text(path: str) -> str:
    """Read a prompt from a file, or from standard input if the path is "-".

    Raises:
        ConfigError: If it cannot be read as UTF-8 text.
    """
    from pathlib import Path

    try:
        if path == "-":
            return sys.stdin.read()
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        name = "standard input" if path == "-" else path
        raise ConfigError(f"{name} is not UTF-8 text.") from exc
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}.") from exc


def read_line() -> str:
    """Read a line from standard input that is no terminal; "" at its end.

    Raises:
        ConfigError: If it is not UTF-8 text.
    """
    try:
        return sys.stdin.readline()
    except UnicodeDecodeError as exc:
        raise ConfigError("standard input is not UTF-8 text.") from exc


def print_stats(console: Console, engine: Engine, results: Sequence[GenerationResult]) -> None:
    """Print what speculation did, one line per sample, and what exact mode found."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    is_many = len(results) > 1
    names = ("tokens", "rounds", "drafted", "accepted", "tau", "tok/s", "first token")
    for name in (("sample",) if is_many else ()) + names:
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        s = result.stats
        cells = [f"{result.prompt_index}.{result.sample_index}"] if is_many else []
        cells += [str(s.output_tokens), str(s.rounds), str(s.verified), str(s.accepted)]
        cells += [f"{s.accepted_length:.2f}", f"{s.tokens_per_second:.1f}"]
        table.add_row(*cells, f"{s.time_to_first_token:.2f} s")
    console.print(table)
    for line in _summary(engine, [result.stats for result in results]):
        print_note(console, line)


def _draft(engine: Engine) -> str:
    """The drafter's name, and how its weights are packed if they are."""
    weights = getattr(engine.drafter, "weights", "")
    return f"{engine.drafter.name} ({weights} weights)" if weights else engine.drafter.name


def _summary(engine: Engine, stats: Sequence[RequestStats]) -> list[str]:
    """Lines about all samples together: acceptance by depth, time, model, exact mode."""
    lines = []
    depth = max((len(s.verified_at_depth) for s in stats), default=0)
    rates = []
    for k in range(depth):
        verified = sum(s.verified_at_depth[k] for s in stats if k < len(s.verified_at_depth))
        accepted = sum(s.accepted_at_depth[k] for s in stats if k < len(s.accepted_at_depth))
        rates.append(f"{100 * accepted / verified:.0f}%" if verified else "-")
    forced = sum(s.forced for s in stats)
    if forced:
        lines.append(f"{forced} of the accepted tokens were all that the grammar allowed")
    if rates:
        lines.append("rounds that accepted a token at depth 1, 2, ...: " + " ".join(rates))
    chosen, woken = engine.stats.experts_chosen, engine.stats.experts_woken
    if woken:
        lines.append(f"experts: each that a step read served {chosen / woken:.2f} of its rows")
    parts = {
        "prefill": sum(s.seconds_prefill for s in stats),
        "draft": sum(s.seconds_draft for s in stats),
        "verify": sum(s.seconds_verify for s in stats),
        "rest": sum(s.seconds_rest for s in stats),
    }
    lines.append("seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in parts.items()))
    info, exactness = engine.target.info, engine.target.exactness
    dtype = precision(info.dtype, info.quant)
    lines.append(
        f"target {info.name} ({info.family}, {dtype}, {info.device}), draft {_draft(engine)}"
    )
    lines.append(
        f"exact mode {exactness.reason}; linear kernel {exactness.backend}, "
        f"at least {exactness.min_rows} row{'s' if exactness.min_rows > 1 else ''} a forward"
    )
    return lines
