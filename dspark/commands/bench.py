"""`dspark bench`: measure speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark.commands import console as ui
from dspark.commands.bench_notes import finish, introduce, print_notes
from dspark.commands.bench_progress import show_progress
from dspark.commands.bench_table import bench_tables
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
from dspark.commands.tables import print_tables
from dspark.request import SamplingParams

if TYPE_CHECKING:
    from rich.console import Console

    from dspark.eval.bench import Bench, Contestant
    from dspark.eval.bench_log import BenchLog
    from dspark.eval.bench_setup import Servers, Setup

__all__ = ["bench_command"]


def bench_command(  # noqa: PLR0913 - one parameter per option is how Typer works
    target: TargetOption = "smollm2-135m",
    draft: Annotated[
        list[str] | None,
        typer.Option(
            "--draft",
            help="none, auto, lookup, lookup:FILE, a model, or one of these with +lookup "
            "(repeatable; default: auto; none is always measured too).",
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
            help="Drafted nodes per round (repeatable; default: the engine's choice, by cost).",
        ),
    ] = None,
    depth: Annotated[int | None, typer.Option("--depth", help="Longest drafted path.")] = None,
    auto_off: Annotated[
        bool, typer.Option("--auto-off/--no-auto-off", help="Stop drafting while it loses.")
    ] = True,
    runner: Annotated[
        list[str] | None,
        typer.Option(
            "--runner",
            help="Measure another program too: transformers, transformers:lookup, "
            "transformers:assisted=MODEL, llama.cpp=FILE.gguf or llama.cpp:lookup=FILE.gguf "
            "(repeatable).",
        ),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(
            "--url", help="Measure an OpenAI-compatible server too: NAME=URL (repeatable)."
        ),
    ] = None,
    url_model: Annotated[
        str | None,
        typer.Option("--url-model", help="Model to ask servers for (default: their first)."),
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option("--api-key-env", help="Environment variable that holds the servers' key."),
    ] = None,
    url_timeout: Annotated[
        float, typer.Option("--url-timeout", help="Seconds that a server may be silent.")
    ] = 60.0,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", help="Configuration that speed-ups are relative to (default: none)."
        ),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts",
            help="A .jsonl file, hub:ORG/NAME[@REVISION][:SPLIT], or dspark for the built-in set; "
            "first turns are asked.",
        ),
    ] = "dspark",
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Prompts of the set, over categories.")
    ] = 12,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens of an answer.")] = 128,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Go on after an end token, so that all answers are of one length.",
        ),
    ] = True,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus, in (0, 1].")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="0 keeps all tokens.")] = 0,
    min_p: Annotated[float, typer.Option("--min-p", help="In [0, 1].")] = 0.0,
    rule: Annotated[
        str,
        typer.Option("--rule", help="auto, greedy, coupled, sample-match, rejection or block."),
    ] = "auto",
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Every prompt's seed is derived from it.")
    ] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(
            "--concurrency", min=1, help="Requests under way at a time (repeatable; default: 1)."
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Runs of every configuration that count.")
    ] = 3,
    warm_up: Annotated[
        int, typer.Option("--warm-up", min=0, help="Short runs before the first that counts.")
    ] = 1,
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
        typer.Option("--log", help="Keep every run here (default: beside --out, .log.jsonl)."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of going on from the log.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no notes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure speed: drafts, trees, other programs and servers, interleaved in one run."""
    from dspark.eval.bench import Bench
    from dspark.eval.bench_setup import (
        NONE,
        Servers,
        Setup,
        bench_key,
        bench_requests,
        pick_baseline,
    )
    from dspark.eval.prompts import load_prompts
    from dspark.eval.results import RunFacts, build_header, write_results

    asked = load_prompts(prompts).select(limit, first_turn=True)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        ignore_eos=ignore_eos,
        rule=rule,
        depth=depth,
    )
    shapes = _Shapes(widths=tuple(width or ()), budgets=tuple(tree_budget or ()))
    shapes.check(params)
    servers = Servers(
        urls=url or (), model=url_model, key_variable=api_key_env, timeout=url_timeout
    )
    console = ui.stderr_console()
    engine = ui.load_engine(
        console,
        target=target,
        draft=NONE,
        dtype=dtype,
        quant=quant,
        device=device,
        threads=threads,
        exact=exact,
        expert_memory=expert_memory,
        think=think,
        effort=effort,
    )
    is_raw = raw or engine.codec is None or not engine.codec.has_chat_template
    setup = Setup(
        engine=engine,
        target=target,
        dtype=dtype,
        device=device,
        params=params,
        requests=bench_requests(engine, asked, seed=seed, is_raw=is_raw),
        is_raw=is_raw,
        think=think,
        auto_off=auto_off,
    )
    drafts = _with_plain(draft or ["auto"], baseline)
    contestants = _contestants(setup, drafts, shapes, runner or (), servers)
    levels = list(dict.fromkeys(concurrency or [1]))
    facts = RunFacts(
        target=target,
        template="raw" if is_raw else "chat",
        drafts=tuple(drafts),
        params=tuple(dict.fromkeys(contestant.params for contestant in contestants)),
        prompts=(asked,),
        think=think,
        effort=effort,
        seed=seed,
        batch=max(levels),
        warm_ups=warm_up,
        repeats=repeats,
    )
    header = {**build_header(engine, facts), "concurrencies": levels}
    base = pick_baseline(contestants, baseline)
    run_log, is_kept = _open_log(bench_key(header, contestants), log=log, out=out, is_fresh=fresh)
    bench = Bench(
        contestants,
        setup.requests,
        concurrencies=levels,
        repeats=repeats,
        warm_ups=warm_up,
        device=engine.target.info.device,
        log=run_log,
    )
    if not quiet:
        introduce(console, header, bench)
    _run(console, bench, run_log, is_quiet=quiet)
    results = bench.results(header, baseline=base, seed=seed)
    if out is not None:
        write_results(out, results)
    _print_results(results, is_json=as_json)
    if not quiet:
        print_notes(console, results, bench, run_log)
    finish(console, results, run_log, is_kept=is_kept)


def _run(console: Console, bench: Bench, log: BenchLog, *, is_quiet: bool) -> None:
    try:
        with show_progress(console, bench.planned, is_on=not is_quiet) as watcher:
            bench.run(watcher)
    except KeyboardInterrupt:
        ui.print_note(console, f"interrupted; {log.count} finished runs are kept in {log.path}")
        ui.print_note(console, "run the same command again to go on from there")
        raise typer.Exit(130) from None
    finally:
        log.close()


def _print_results(results: dict[str, Any], *, is_json: bool) -> None:
    if is_json:
        print(json.dumps(results, ensure_ascii=False, allow_nan=False))
    else:
        print_tables(bench_tables(results))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shapes:
    """Shapes of trees to be measured.

    Attributes:
        widths: Children per node.
        budgets: Drafted nodes per round.
    """

    widths: tuple[int, ...]
    budgets: tuple[int, ...]

    def check(self, params: SamplingParams) -> None:
        """Refuse what is out of range, before a model is loaded."""
        for width in self.widths or (None,):
            for budget in self.budgets or (None,):
                _ = replace(params, width=width, tree_budget=budget).resolved_rule


def _with_plain(drafts: Sequence[str], baseline: str | None) -> list[str]:
    """The drafts, with plain decoding before them unless another baseline was named."""
    if baseline is not None or "none" in drafts:
        return list(drafts)
    return ["none", *drafts]


def _contestants(
    setup: Setup,
    drafts: Sequence[str],
    shapes: _Shapes,
    runners: Sequence[str],
    servers: Servers,
) -> list[Contestant]:
    from dspark.eval.bench_setup import other_contestants, own_contestants, server_contestants

    others = other_contestants(setup, runners) + server_contestants(setup, servers)
    own = own_contestants(
        setup, drafts, widths=shapes.widths, budgets=shapes.budgets, loaded="none"
    )
    return own + others


def _open_log(
    key: str, *, log: str | None, out: str | None, is_fresh: bool
) -> tuple[BenchLog, bool]:
    """The log, and whether it stays when the run has ended."""
    from dspark.eval.bench_log import BenchLog
    from dspark.models.fetch import cache_root

    if log is not None:
        return BenchLog(log, key, is_fresh=is_fresh), True
    if out is not None:
        return BenchLog(Path(out).with_suffix(".log.jsonl"), key, is_fresh=is_fresh), True
    return BenchLog(cache_root() / "bench" / f"{key}.jsonl", key, is_fresh=is_fresh), False
