"""`dspark eval`: measure acceptance."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from dspark.commands import console as ui
from dspark.commands.console import (
    DeviceOption,
    DtypeOption,
    EffortOption,
    ExactOption,
    ExpertMemoryOption,
    QuantOption,
    TargetOption,
    ThinkOption,
    ThreadsOption,
)
from dspark.commands.plan import parse_tokens
from dspark.errors import ConfigError
from dspark.request import SamplingParams

if TYPE_CHECKING:
    from rich.console import Console

    from dspark.engine import Engine
    from dspark.eval.campaign import Campaign, Configuration, Outcome
    from dspark.eval.log import RunLog
    from dspark.eval.results import RunFacts

__all__ = ["eval_command"]

Reporter: TypeAlias = "Callable[[Configuration], Callable[[float], None] | None]"
"""Configuration -> what its campaign tells the turns done, or None."""


def eval_command(  # noqa: PLR0913 - one parameter per option is how Typer works
    target: TargetOption = "smollm2-135m",
    draft: Annotated[
        list[str] | None,
        typer.Option(
            "--draft",
            help="auto, none, lookup, lookup:FILE, a model, or one of these with +lookup "
            "(repeatable; default: auto).",
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            help="A .jsonl file, hub:ORG/NAME[@REVISION][:SPLIT], or dspark for the built-in set "
            "(repeatable; default: dspark).",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Questions of each set, over categories.")
    ] = None,
    first_turn: Annotated[
        bool, typer.Option("--first-turn", help="Ask the first turn of each question only.")
    ] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens of an answer.")] = 256,
    temperature: Annotated[
        list[float] | None,
        typer.Option("--temperature", help="0 is greedy (repeatable; default: 0)."),
    ] = None,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus, in (0, 1].")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="0 keeps all tokens.")] = 0,
    min_p: Annotated[float, typer.Option("--min-p", help="In [0, 1].")] = 0.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Every question's seed is derived from it.")
    ] = 0,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            help="auto, greedy, coupled, sample-match, rejection or block, at temperatures over 0 "
            "(repeatable; default: auto).",
        ),
    ] = None,
    width: Annotated[
        list[int] | None,
        typer.Option(
            "--width",
            help="Children per node; 1 is a chain (repeatable; default: the draft's choice).",
        ),
    ] = None,
    tree_budget: Annotated[
        list[int] | None,
        typer.Option(
            "--tree-budget",
            help="Drafted nodes per round; 0 is plain (repeatable; default: the engine's).",
        ),
    ] = None,
    depth: Annotated[int | None, typer.Option("--depth", help="Longest drafted path.")] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after an end token.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Questions at a time.")] = 1,
    warm_up: Annotated[
        int, typer.Option("--warm-up", min=0, help="Answers before the first that counts.")
    ] = 0,
    definition: Annotated[
        list[str] | None,
        typer.Option(
            "--definition",
            help="Add another project's figures: deepspec, specbench or vllm (repeatable).",
        ),
    ] = None,
    context_buckets: Annotated[
        str | None,
        typer.Option("--context-buckets", help="Where context lengths are parted, such as 1K,4K."),
    ] = None,
    dtype: DtypeOption = "auto",
    quant: QuantOption = "none",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    exact: ExactOption = None,
    expert_memory: ExpertMemoryOption = None,
    think: ThinkOption = None,
    effort: EffortOption = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Write the results as JSON to this file.")
    ] = None,
    log: Annotated[
        str | None,
        typer.Option("--log", help="Keep every round here (default: beside --out, .log.jsonl)."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of going on from the log.")
    ] = False,
    answers: Annotated[
        str | None,
        typer.Option("--answers", help="Write Spec-Bench answer files to this folder."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no notes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure how much of a draft the target accepts, by position, category and context."""
    from dspark.eval.acceptance import CONTEXT_EDGES
    from dspark.eval.campaign import Campaign, configurations
    from dspark.eval.prompts import OWN, load_prompts
    from dspark.eval.results import RunFacts, write_results

    sets = [load_prompts(spec).select(limit, first_turn=first_turn) for spec in prompts or [OWN]]
    kinds = [
        SamplingParams(
            max_tokens=max_tokens,
            temperature=t,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            ignore_eos=ignore_eos,
            rule=r,
            width=w,
            tree_budget=budget,
            depth=depth,
        )
        for t, r in _laws(temperature or [0.0], rule or ["auto"])
        for w in width or (None,)
        for budget in tree_budget or (None,)
    ]
    for params in kinds:
        _ = params.resolved_rule  # refuse a contradiction before a model is loaded
    edges = CONTEXT_EDGES if context_buckets is None else _edges(context_buckets)
    cells = configurations(draft or ["auto"], sets, kinds, definition or ())
    console = ui.stderr_console()
    engine = ui.load_engine(
        console,
        target=target,
        draft=cells[0].draft,
        dtype=dtype,
        quant=quant,
        device=device,
        threads=threads,
        exact=exact,
        expert_memory=expert_memory,
        think=think,
        effort=effort,
    )
    has_template = engine.codec is not None and engine.codec.has_chat_template
    facts = RunFacts(
        target=target,
        template="chat" if has_template and not raw else "raw",
        prompts=tuple(sets),
        think=think,
        effort=effort,
        seed=seed,
        batch=batch,
        warm_ups=warm_up,
    )
    engines = _engines(engine, cells, target=target, dtype=dtype, device=device)
    run_log, is_kept = _open_log(facts, cells, log=log, out=out, is_fresh=fresh)
    campaign = Campaign(facts, log=run_log, definitions=definition or (), context_edges=edges)
    try:
        with _progress(console, cells, is_on=not quiet) as report:
            outcomes = [campaign.run(engines[c.draft], c, on_progress=report(c)) for c in cells]
    except KeyboardInterrupt:
        _say_how_to_resume(console, run_log)
        raise typer.Exit(130) from None
    finally:
        run_log.close()
    results = campaign.results(outcomes)
    if out is not None:
        write_results(out, results)
    _write_answers(console, answers, outcomes, target=target, is_quiet=quiet)
    if as_json:
        print(json.dumps(results, ensure_ascii=False, allow_nan=False))
    else:
        from dspark.commands.eval_table import eval_tables
        from dspark.commands.tables import print_tables

        print_tables(eval_tables(results))
    _finish(console, campaign, outcomes, run_log, is_kept=is_kept, is_quiet=quiet)


def _laws(temperatures: Sequence[float], rules: Sequence[str]) -> list[tuple[float, str]]:
    """Every temperature with every rule; with the first alone at 0, where all are greedy."""
    for rule in rules:
        _ = SamplingParams(rule=rule)  # refuse what is none, though it may not be tried
    return [(t, rule) for t in temperatures for rule in (rules if t else rules[:1])]


def _edges(text: str) -> tuple[int, ...]:
    from dspark.eval.acceptance import check_edges

    try:
        edges = tuple(parse_tokens(part) for part in text.split(","))
    except ConfigError as exc:
        raise ConfigError(
            f"--context-buckets is {text!r}, but must be lengths in tokens, such as 1K,4K,16K."
        ) from exc
    check_edges(edges)
    return edges


def _engines(
    engine: Engine, cells: Sequence[Configuration], *, target: str, dtype: str, device: str
) -> dict[str, Engine]:
    """One engine per draft, all of one target; loaded at once, so that a bad name fails early."""
    from dspark.eval.runner import load_drafts

    engines = {cells[0].draft: engine}
    for cell in cells:
        if cell.draft not in engines:
            engines[cell.draft] = load_drafts(
                engine, target, cell.draft, dtype=dtype, device=device
            )
    return engines


def _open_log(
    facts: RunFacts,
    cells: Sequence[Configuration],
    *,
    log: str | None,
    out: str | None,
    is_fresh: bool,
) -> tuple[RunLog, bool]:
    """The log, and whether it stays when the run has ended."""
    from dspark.eval.log import RunLog, settings_key
    from dspark.eval.results import describe_params
    from dspark.models.fetch import cache_root

    if log is not None:
        return RunLog(log, is_fresh=is_fresh), True
    if out is not None:
        return RunLog(Path(out).with_suffix(".log.jsonl"), is_fresh=is_fresh), True
    described = [[cell.name, cell.prompts.sha256, describe_params(cell.params)] for cell in cells]
    own = [facts.target, facts.template, facts.think, facts.effort, facts.seed, facts.batch]
    key = settings_key({"cells": described, "facts": own})
    return RunLog(cache_root() / "eval" / f"{key}.jsonl", is_fresh=is_fresh), False


@contextmanager
def _progress(
    console: Console, cells: Sequence[Configuration], *, is_on: bool
) -> Iterator[Reporter]:
    """A bar with the time left on a terminal; nothing elsewhere."""
    with ui.time_left_bar(console, is_on=is_on, counts="answers") as bar:
        if bar is None:
            yield lambda cell: None
            return
        task = bar.add_task("", total=sum(cell.prompts.num_turns for cell in cells))

        def report(cell: Configuration) -> Callable[[float], None]:
            before = sum(c.prompts.num_turns for c in cells[: cells.index(cell)])
            return lambda done: bar.update(task, description=cell.name, completed=before + done)

        yield report


def _say_how_to_resume(console: Console, log: RunLog) -> None:
    ui.print_note(console, f"interrupted; {log.count} finished questions are kept in {log.path}")
    ui.print_note(console, "run the same command again to go on from there")


def _write_answers(
    console: Console,
    folder: str | None,
    outcomes: Sequence[Outcome],
    *,
    target: str,
    is_quiet: bool,
) -> None:
    if folder is None:
        return
    from dspark.eval.results import describe_model
    from dspark.eval.specbench import write_answers

    name = describe_model(target)["id"].replace("/", "-")
    for outcome in outcomes:
        model_id = f"{name}-{outcome.configuration.model_id}"
        path = write_answers(folder, model_id, outcome.records)
        if not is_quiet:
            ui.print_note(console, f"answers: {path}")


def _finish(
    console: Console,
    campaign: Campaign,
    outcomes: Sequence[Outcome],
    log: RunLog,
    *,
    is_kept: bool,
    is_quiet: bool,
) -> None:
    """Say where things are; exit 2 if a question failed."""
    resumed = sum(outcome.figures["resumed"] for outcome in outcomes)
    if resumed and not is_quiet:
        total = sum(len(outcome.records) for outcome in outcomes)
        ui.print_note(console, f"{resumed} of {total} questions were taken from {log.path}")
    failed = [failure for outcome in outcomes for failure in outcome.figures["failed"]]
    for failure in failed:
        ui.print_error(console, f"question {failure['question_id']}: {failure['error']}")
    if failed:
        raise typer.Exit(2)
    if not is_kept:
        log.path.unlink(missing_ok=True)
