"""`dspark doctor`: what is the matter with this target, draft and machine?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark.commands import console as ui
from dspark.commands.console import (
    DeviceOption,
    DraftOption,
    DtypeOption,
    EffortOption,
    ExactOption,
    ExpertMemoryOption,
    QuantOption,
    TargetOption,
    ThinkOption,
    ThreadsOption,
)
from dspark.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.padding import Padding

    from dspark.engine import Engine
    from dspark.eval.doctor.findings import DoctorReport, Finding
    from dspark.eval.doctor.run import Progress
    from dspark.eval.doctor.text_checks import Asked
    from dspark.eval.prompts import PromptSet

__all__ = ["doctor"]

_STYLES = {"problem": "bold red", "warning": "yellow", "note": "cyan"}


def doctor(  # noqa: PLR0913 - one parameter per option is how Typer works
    target: TargetOption = "smollm2-135m",
    draft: DraftOption = "auto",
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            help="A .jsonl file, hub:ORG/NAME[@REVISION][:SPLIT], or dspark for the built-in set "
            "(default: dspark).",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Questions, over categories (default: 6).")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=8, help="Tokens of an answer (default: 64).")
    ] = None,
    tree_budget: Annotated[
        int, typer.Option("--tree-budget", min=1, help="Drafted nodes per round.")
    ] = 15,
    depth: Annotated[int, typer.Option("--depth", min=1, help="Longest drafted path.")] = 8,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer questions, shorter answers, fewer variants.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    dtype: DtypeOption = "auto",
    quant: QuantOption = "none",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    exact: ExactOption = None,
    expert_memory: ExpertMemoryOption = None,
    think: ThinkOption = None,
    effort: EffortOption = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Write the report as JSON to this file.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Find out why a draft does badly, or that it will not help, and what to do."""
    from dspark.eval.doctor.exam import DoctorConfig
    from dspark.eval.doctor.patient import load_patient
    from dspark.eval.doctor.run import diagnose
    from dspark.eval.prompts import OWN, load_prompts
    from dspark.eval.results import write_results

    wanted = (3 if quick else 6) if limit is None else limit
    asked_of = load_prompts(prompts or OWN).select(wanted, first_turn=True)
    config = DoctorConfig(
        max_tokens=(32 if quick else 64) if max_tokens is None else max_tokens,
        tree_budget=tree_budget,
        depth=depth,
        is_quick=quick,
        is_raw=raw,
    )
    if out is not None and not Path(out).expanduser().absolute().parent.is_dir():
        raise DataError(f"the report cannot be written to {out}: there is no such folder.")
    console = ui.stderr_console()
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
        think=think,
        effort=effort,
    )
    with ui.loading(console, f"loading {draft}"):
        patient = load_patient(engine, target, draft, dtype=dtype, device=device)
    header = _header(engine, asked_of, target=target, draft=draft, is_raw=raw, think=think)
    with _progress(console, is_on=not quiet) as show:
        report = diagnose(patient, _asked(asked_of), config, header=header, on_progress=show)
    if out is not None:
        write_results(out, report.to_json())
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False))
    else:
        _print(report)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _asked(prompts: PromptSet) -> Sequence[Asked]:
    from dspark.eval.doctor.text_checks import Asked

    return [
        Asked(question_id=q.question_id, category=q.category, text=q.turns[0])
        for q in prompts.questions
    ]


def _header(
    engine: Engine,
    prompts: PromptSet,
    *,
    target: str,
    draft: str,
    is_raw: bool,
    think: bool | None,
) -> dict[str, object]:
    from dspark.eval.results import RunFacts, build_header

    has_template = engine.codec is not None and engine.codec.has_chat_template
    facts = RunFacts(
        target=target,
        drafts=(draft,),
        template="chat" if has_template and not is_raw else "raw",
        prompts=(prompts,),
        think=think,
    )
    return build_header(engine, facts)


@contextmanager
def _progress(console: Console, *, is_on: bool) -> Iterator[Progress | None]:
    """A bar with what runs and the time left, on a terminal only."""
    if not is_on or not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0, left="")

        def show(what: str, done: float, seconds: float) -> None:
            left = f"about {seconds:.0f} s left" if seconds else ""
            bar.update(task, description=what, completed=done, left=left)

        yield show


# -- what a person sees -----------------------------------------------------------------------


def _print(report: DoctorReport) -> None:
    """Findings, worst first; the cost model; what is fine, and what was not checked."""
    if not sys.stdout.isatty():
        _print_plain(report)
        return
    from rich.console import Console

    from dspark.eval.doctor.findings import Severity

    console = Console(highlight=False)
    for severity in Severity:
        for name, finding in report.found(severity):
            _print_finding(console, name, finding)
    if report.cost is not None:
        _print_cost(console, report.cost)
    for title, rows in _summaries(report):
        console.print(f"{title}:")
        console.print(_grid(rows))
        console.print()
    console.print(report.verdict(), markup=False)


def _print_plain(report: DoctorReport) -> None:
    """The same, tab-separated."""
    from dspark.eval.doctor.findings import Severity

    for severity in Severity:
        for name, finding in report.found(severity):
            print("\t".join((severity.value, name, finding.what)))
            print("\t".join(("", "seen", finding.evidence)))
            print("\t".join(("", "do", finding.advice)))
    if report.cost is not None:
        for row in (_COST_HEADS, *_cost_rows(report.cost)):
            print("\t".join(row))
        print(_cost_line(report.cost))
    for title, rows in _summaries(report):
        for name, seen in rows:
            print("\t".join((title, name, seen)))
    print(report.verdict())


def _summaries(report: DoctorReport) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """What is fine, and what was not checked, by reason."""
    fine = [(check.name, check.seen) for check in report.by_status("fine")]
    reasons: dict[str, list[str]] = {}
    for check in report.by_status("not checked"):
        reasons.setdefault(check.seen, []).append(check.name)
    skipped = [(", ".join(names), why) for why, names in reasons.items()]
    for title, rows in (("fine", fine), ("not checked", skipped)):
        if rows:
            yield title, rows


def _print_finding(console: Console, name: str, finding: Finding) -> None:
    from rich.text import Text

    word = finding.severity.value
    console.print(Text.assemble((word, _STYLES[word]), f" ({name}): {finding.what}"))
    console.print(_grid([("seen", finding.evidence), ("do", finding.advice)]))
    console.print()


def _grid(rows: Sequence[tuple[str, str]]) -> Padding:
    """Two columns without a head, indented, folded to the terminal."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(max_width=40)
    grid.add_column(overflow="fold", style="dim")
    for name, text in rows:
        grid.add_row(Text(name), Text(text))
    return Padding(grid, (0, 0, 0, 2))


_COST_HEADS = (
    "tree budget",
    "tau",
    "breaks even at",
    "draft ms",
    "round ms",
    "plain ms",
    "speed-up",
)


def _cost_rows(cost: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for own in cost["budgets"]:
        times = (own["draft_seconds"], own["round_seconds"], own["plain_seconds"])
        yield (
            str(own["budget"]),
            f"{own['tau']:.2f}",
            f"{own['break_even']:.2f}",
            *(f"{1000 * value:.1f}" for value in times),
            f"{own['speedup']:.2f}x",
        )


def _cost_line(cost: Mapping[str, Any]) -> str:
    line = f"predicted with {cost['best_budget']} nodes: {cost['predicted']:.2f}x"
    measured = cost["measured"]
    if measured is None:
        return line
    return (
        f"{line}; measured: {measured['speedup']:.2f}x ({measured['drafted']:.1f} against "
        f"{measured['plain']:.1f} tokens per second)"
    )


def _print_cost(console: Console, cost: Mapping[str, Any]) -> None:
    """What the cost model says of each tree budget."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for head in _COST_HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    for row in _cost_rows(cost):
        table.add_row(*row)
    console.print(table)
    console.print(_cost_line(cost))
    console.print()
