"""`dspark simulate`: how a server would do, before there is one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark.commands import console as ui
from dspark.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from dspark.eval.simulate.sweep import Load, Sweep

__all__ = ["simulate"]

_POLICIES = ("plain", "mtp-1", "fixed:5", "dspark")
_CONCURRENCY = "1,2,4,8,16,32,64,128,256,512,1024"


def simulate(  # noqa: PLR0913 - one parameter per option is how Typer works
    profile: Annotated[
        str | None, typer.Option("--profile", help="Step times: a file of dspark profile.")
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", help="Without --profile: a DeepSeek-V4 preset, config or folder."),
    ] = "v4-flash-dspark",
    gpu: Annotated[
        str, typer.Option("--gpu", help="H100-80GB, H200-141GB or B200-180GB.")
    ] = "H200-141GB",
    gpus: Annotated[int, typer.Option("--gpus", help="How many work on a step.")] = 8,
    gpu_bandwidth: Annotated[
        float | None, typer.Option("--gpu-bandwidth", help="GB a second of another GPU.")
    ] = None,
    bf16_tflops: Annotated[
        float | None, typer.Option("--bf16-tflops", help="Its dense TFLOP/s in bfloat16.")
    ] = None,
    fp8_tflops: Annotated[
        float | None, typer.Option("--fp8-tflops", help="Its dense TFLOP/s in FP8.")
    ] = None,
    fp4_tflops: Annotated[
        float | None, typer.Option("--fp4-tflops", help="Its dense TFLOP/s in FP4.")
    ] = None,
    bandwidth_share: Annotated[
        float, typer.Option("--bandwidth-share", help="Share of the bandwidth that is reached.")
    ] = 0.7,
    flops_share: Annotated[
        float, typer.Option("--flops-share", help="Share of the FLOP/s that is reached.")
    ] = 0.5,
    step_ms: Annotated[
        float, typer.Option("--step-ms", help="Milliseconds of a step on top of the roofline.")
    ] = 0.0,
    draft_ms: Annotated[
        str | None,
        typer.Option("--draft-ms", help="Drafting of a round: 3, or 3+0.2 for 0.2 more a request."),
    ] = None,
    rest_ms: Annotated[
        str | None, typer.Option("--rest-ms", help="What else a round takes, in the same form.")
    ] = None,
    prefill_rate: Annotated[
        float | None,
        typer.Option(
            "--prefill-rate", help="Prompt tokens a second (default: rows of the forward)."
        ),
    ] = None,
    bench: Annotated[
        str | None,
        typer.Option("--bench", help="Take these three from a file of dspark bench."),
    ] = None,
    bench_configuration: Annotated[
        str | None, typer.Option("--bench-configuration", help="Which of its configurations.")
    ] = None,
    trace: Annotated[
        str | None, typer.Option("--trace", help="Acceptance: a log of dspark eval.")
    ] = None,
    configuration: Annotated[
        str | None, typer.Option("--configuration", help="Which of its configurations.")
    ] = None,
    tree_trace: Annotated[
        str | None, typer.Option("--tree-trace", help="A log of dspark eval with trees.")
    ] = None,
    tree_configuration: Annotated[
        str | None, typer.Option("--tree-configuration", help="Which of its configurations.")
    ] = None,
    acceptance: Annotated[
        str,
        typer.Option(
            "--acceptance",
            help="Without --trace: v4-pro-thinking, v4-pro-chat, or conditional rates by position.",
        ),
    ] = "v4-pro-thinking",
    auroc: Annotated[
        float, typer.Option("--auroc", help="Of the draft's confidence; 0.5 for none.")
    ] = 0.85,
    mtp_acceptance: Annotated[
        float | None,
        typer.Option("--mtp-acceptance", help="Of MTP-1 (default: of the chain's first token)."),
    ] = None,
    tree_recovery: Annotated[
        float | None,
        typer.Option(
            "--tree-recovery", help="Trees: a next candidate is right if those before are wrong."
        ),
    ] = None,
    tree_budget: Annotated[int, typer.Option("--tree-budget", help="Nodes of a tree.")] = 15,
    budget: Annotated[
        int | None, typer.Option("--budget", min=1, help="Tokens of a chain at the most.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="plain, mtp-1, fixed:N, dspark, tree, chain:SCHEDULE or tree:SCHEDULE "
            "(repeatable; default: plain, mtp-1, fixed:5, dspark).",
        ),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option("--concurrency", help=f"Requests under way (default: {_CONCURRENCY})."),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option("--rate", help="Instead: requests a second that arrive, such as 0.5,1,2."),
    ] = None,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(
            "--prompt-tokens",
            help="N, lognormal:MEDIAN:SIGMA or trace (default: trace if there is one, else 1K).",
        ),
    ] = None,
    output_tokens: Annotated[
        str | None,
        typer.Option("--output-tokens", help="Likewise (default: trace, else lognormal:512:0.6)."),
    ] = None,
    requests: Annotated[
        int,
        typer.Option("--requests", min=1, help="Requests of each point, three a slot at least."),
    ] = 4000,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Requests in a round at the most.")
    ] = 1024,
    max_rows: Annotated[
        int | None,
        typer.Option("--max-rows", min=1, help="Rows of anchors and nodes; budgets shrink to fit."),
    ] = None,
    prefill_chunk: Annotated[
        int,
        typer.Option(
            "--prefill-chunk", min=0, help="Prompt tokens of a forward; 0: prompts run elsewhere."
        ),
    ] = 512,
    kv_tokens: Annotated[
        int | None, typer.Option("--kv-tokens", min=1, help="Tokens of K/V that fit.")
    ] = None,
    skip: Annotated[
        bool,
        typer.Option("--skip/--no-skip", help="Let schedules leave out drafting that cannot pay."),
    ] = True,
    baseline: Annotated[
        str, typer.Option("--baseline", help="The policy that others are held against.")
    ] = "mtp-1",
    speed: Annotated[
        list[float] | None,
        typer.Option("--speed", help="Compare at this per-user speed, tokens/s (repeatable)."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of all draws.")] = 0,
    plot: Annotated[
        str | None, typer.Option("--plot", help="Draw the points into this .svg or .png file.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Write the results as JSON to this file.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no assumptions.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Simulate serving: throughput, per-user speed and verification budget by load."""
    from dspark.eval.results import write_results
    from dspark.eval.simulate.policy import parse_policy
    from dspark.eval.simulate.run import Limits
    from dspark.eval.simulate.setup import AcceptanceAsked, MachineAsked, build_costs, build_pools
    from dspark.eval.simulate.sweep import Sweep
    from dspark.eval.simulate.workload import parse_lengths

    _check_files(plot, out)
    if not 0.5 <= auroc <= 0.99:
        raise ConfigError(f"--auroc is {auroc:g}, but must be in [0.5, 0.99].")
    console = ui.stderr_console()
    costs = build_costs(
        MachineAsked(
            profile=profile,
            model=model,
            gpu=gpu,
            gpu_bandwidth=gpu_bandwidth,
            tflops=(bf16_tflops, fp8_tflops, fp4_tflops),
            gpus=gpus,
            bandwidth_share=bandwidth_share,
            flops_share=flops_share,
            step_ms=step_ms,
            draft_ms=draft_ms,
            rest_ms=rest_ms,
            prefill_rate=prefill_rate,
            bench=bench,
            bench_configuration=bench_configuration,
        )
    )
    with ui.loading(console, "reading acceptance"):
        pools, told = build_pools(
            AcceptanceAsked(
                trace=trace,
                configuration=configuration,
                tree_trace=tree_trace,
                tree_configuration=tree_configuration,
                rates=acceptance,
                auroc=None if auroc == 0.5 else auroc,
                mtp_rate=mtp_acceptance,
                tree_recovery=tree_recovery,
                tree_budget=tree_budget,
                budget=budget,
                seed=seed,
            )
        )
    has_lengths = any(pool.lengths is not None for pool in pools.values())
    defaults = ("trace", "trace") if has_lengths else ("1K", "lognormal:512:0.6")
    prompt_law = parse_lengths("--prompt-tokens", prompt_tokens or defaults[0])
    output_law = parse_lengths("--output-tokens", output_tokens or defaults[1])
    sweep = Sweep(
        policies=[parse_policy(text, skips=skip) for text in policy or _POLICIES],
        loads=_loads(concurrency, rate),
        pools=pools,
        costs=costs,
        limits=Limits(
            max_batch=max_batch,
            max_rows=max_rows,
            prefill_chunk=prefill_chunk or None,
            kv_tokens=kv_tokens,
        ),
        lengths=(prompt_law, output_law),
        requests=requests,
        seed=seed,
    )
    is_interrupted = _run(console, sweep, is_quiet=quiet)
    results = sweep.results(
        _header(profile, model),
        acceptance=told,
        baseline=baseline if any(p.name == baseline for p in sweep.policies) else None,
        speeds=speed or [],
        is_interrupted=is_interrupted,
    )
    if out is not None:
        write_results(out, results)
    _show(console, results, plot=plot, as_json=as_json, is_quiet=quiet)
    if is_interrupted:
        raise typer.Exit(130)


def _check_files(plot: str | None, out: str | None) -> None:
    """Refuse what cannot be written before time is spent."""
    from dspark.eval.profile_plot import check_plot

    if plot is not None:
        check_plot(plot)
    for path in (plot, out):
        if path is not None and not Path(path).expanduser().absolute().parent.is_dir():
            raise DataError(f"{path} cannot be written: there is no such folder.")


def _loads(concurrency: str | None, rate: str | None) -> list[Load]:
    """The loads asked for.

    Raises:
        ConfigError: If both are given, or one is malformed.
    """
    from dspark.eval.simulate.sweep import Load

    if concurrency is not None and rate is not None:
        raise ConfigError("--concurrency and --rate exclude each other.")
    try:
        if rate is not None:
            return [Load(rate=float(part)) for part in rate.split(",")]
        return [Load(concurrency=int(part)) for part in (concurrency or _CONCURRENCY).split(",")]
    except ValueError as exc:
        name, text = ("--rate", rate) if rate is not None else ("--concurrency", concurrency)
        raise ConfigError(f"{name} is {text!r}, but must be numbers, such as 1,4,16.") from exc


def _header(profile: str | None, model: str) -> dict[str, Any]:
    """Which program ran; the target is that of the profile, or the model of the roofline."""
    from dspark.eval.profile import read_profile
    from dspark.eval.results import program_facts

    target: Any = {"id": Path(model).name or model}
    if profile is not None:
        target = read_profile(profile).header.get("target") or {"id": Path(profile).name}
    return {**program_facts(), "target": target}


def _run(console: Console, sweep: Sweep, *, is_quiet: bool) -> bool:
    """Run all points; True if Ctrl-C ended it early."""
    try:
        with _progress(console, is_on=not is_quiet) as report:
            sweep.run(report)
    except KeyboardInterrupt:
        ui.print_note(console, "interrupted: the points that are done follow")
        return True
    return False


@contextmanager
def _progress(console: Console, *, is_on: bool) -> Iterator[Callable[[float, str], None] | None]:
    """A bar with the time left on a terminal; nothing elsewhere."""
    with ui.time_left_bar(console, is_on=is_on) as bar:
        if bar is None:
            yield None
            return
        task = bar.add_task("", total=1.0)
        yield lambda share, name: bar.update(task, completed=share, description=name)


def _show(
    console: Console, results: Mapping[str, Any], *, plot: str | None, as_json: bool, is_quiet: bool
) -> None:
    from dspark.commands.simulate_table import print_plain, print_table
    from dspark.eval.simulate.plot import plot_simulation

    if plot is not None:
        plot_simulation(results, plot)
    if as_json:
        print(json.dumps(results, ensure_ascii=False, allow_nan=False))
        return
    if not is_quiet:
        for line in (*results["assumptions"], *_settings(results["settings"])):
            ui.print_note(console, f"assumed: {line}")
    (print_table if sys.stdout.isatty() else print_plain)(results)


def _settings(settings: Mapping[str, Any]) -> Iterator[str]:
    chunk = settings["prefill_chunk"]
    where = "prompts are run elsewhere" if chunk is None else f"{chunk} prompt tokens a forward"
    yield (
        f"prompts {settings['prompt_tokens']}, answers {settings['output_tokens']}; {where}; "
        f"{settings['requests']:,} requests a point"
    )
