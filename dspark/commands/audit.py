"""`dspark audit`: is this pair of target and draft lossless, here and as it is loaded?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark.commands import console as ui
from dspark.commands.console import (
    DeviceOption,
    DraftOption,
    DraftQuantOption,
    DtypeOption,
    ExactOption,
    ExpertMemoryOption,
    QuantOption,
    TargetOption,
    ThreadsOption,
)
from dspark.errors import ConfigError, DataError
from dspark.request import Prompt, Rule

if TYPE_CHECKING:
    from rich.console import Console

    from dspark.engine import Engine
    from dspark.eval.audit import AuditConfig, Progress
    from dspark.eval.audit_report import AuditReport

__all__ = ["audit"]

_STYLES = {"passed": "green", "found": "bold red", "inconclusive": "yellow"}


def audit(  # noqa: PLR0913 - one parameter per option is how Typer works
    target: TargetOption = "smollm2-135m",
    draft: DraftOption = "auto",
    level: Annotated[
        str, typer.Option("--level", help="quick (under a minute), normal (3) or thorough (20).")
    ] = "normal",
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Time to take (default: the level's own).")
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", help="Audit this rule (repeatable; default: all of them)."),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option("--temperature", help="Of the sampling rules (repeatable)."),
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="0 keeps all tokens.")] = None,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus, in (0, 1].")] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", help="In [0, 1].")] = 0.0,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Audit with this prompt (repeatable).")
    ] = None,
    file: Annotated[
        list[str] | None, typer.Option("--file", help="Read a prompt from a file (repeatable).")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Tokens per sample of the token checks.")
    ] = None,
    tree_budget: Annotated[
        int | None, typer.Option("--tree-budget", help="Drafted nodes per round.")
    ] = None,
    depth: Annotated[int | None, typer.Option("--depth", help="Longest drafted path.")] = None,
    width: Annotated[
        int | None, typer.Option("--width", help="Children per node; 1 is a chain.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="First seed of the noise.")] = 0,
    dtype: DtypeOption = "auto",
    quant: QuantOption = "none",
    draft_quant: DraftQuantOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    exact: ExactOption = None,
    expert_memory: ExpertMemoryOption = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Write the report as JSON to this file, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prove on your own target and draft that drafting changes nothing but the speed."""
    from dspark.eval.audit import AuditConfig, Level
    from dspark.eval.results import write_results

    if level not in list(Level):
        raise ConfigError(f"level is {level!r}, but must be one of {', '.join(Level)}.")
    config = AuditConfig(
        level=Level(level),
        minutes=minutes,
        rules=_rules(rule),
        temperatures=tuple(temperature or (0.7, 1.0)),
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        max_tokens=max_tokens,
        depth=depth,
        width=width,
        tree_budget=tree_budget,
        seed=seed,
    )
    prompts = [*(prompt or []), *(ui.read_text(path) for path in file or [])]
    _check_out(out)
    console = ui.stderr_console()
    engine = ui.load_engine(
        console,
        target=target,
        draft=draft,
        dtype=dtype,
        quant=quant,
        draft_quant=draft_quant,
        device=device,
        threads=threads,
        exact=exact,
        expert_memory=expert_memory,
        auto_off=False,
    )
    named = None if draft == "auto" else draft
    report = _run(console, engine, list(prompts) or None, config, named)
    if out is not None:
        write_results(out, report.as_json())
    if as_json:
        print(json.dumps(report.as_json(), ensure_ascii=False, indent=1))
    else:
        _print(report)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _rules(names: list[str] | None) -> tuple[Rule, ...]:
    allowed = [rule.value for rule in Rule]
    for name in names or []:
        if name not in allowed:
            raise ConfigError(f"rule is {name!r}, but must be one of {', '.join(allowed)}.")
    return tuple(rule for rule in Rule if not names or rule.value in names)


def _run(
    console: Console,
    engine: Engine,
    prompts: list[Prompt] | None,
    config: AuditConfig,
    draft: str | None,
) -> AuditReport:
    from dspark.eval.audit import audit as run_audit

    info, exactness = engine.target.info, engine.target.exactness
    ui.print_note(
        console,
        f"target {info.name} ({ui.precision(info.dtype, info.quant)}), draft "
        f"{engine.drafter.name}; exact mode {exactness.reason}",
    )
    with _progress(console) as show:
        return run_audit(engine, prompts, config, draft=draft, on_progress=show)


@contextmanager
def _progress(console: Console) -> Iterator[Progress | None]:
    """A bar with what runs and the time left, on a terminal only."""
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0, left="")

        def show(what: str, done: float, seconds: float) -> None:
            left = f"{seconds:.0f} s left" if seconds else "finishing the first turn"
            bar.update(task, description=what, completed=done, left=left)

        yield show


def _print(report: AuditReport) -> None:
    """Print the report; the verdict's word is tinted on a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in report.lines():
        word = line.split(" ", 1)[0]
        text = Text(line)
        if word in _STYLES:
            text.stylize(_STYLES[word], 0, len(word))
        console.print(text)


def _check_out(path: str | None) -> None:
    """Refuse a file that cannot be written before minutes are spent on it."""
    if path is not None and not Path(path).expanduser().absolute().parent.is_dir():
        raise DataError(f"the report cannot be written to {path}: there is no such folder.")
