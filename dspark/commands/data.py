"""`dspark data`: make training data of a target's own answers."""

from __future__ import annotations

import json
import os
import sys
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
    TargetOption,
    ThinkOption,
    ThreadsOption,
)
from dspark.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspark.engine import Engine
    from dspark.eval.prompts import PromptSet
    from dspark.text import TextCodec
    from dspark.training.data_answers import Answerer
    from dspark.training.data_run import DataRun

__all__ = ["data_command"]


def data_command(  # noqa: PLR0913 - one parameter per option is how Typer works
    out: Annotated[str, typer.Argument(help="Folder of the data set; an unfinished one goes on.")],
    target: TargetOption = "smollm2-135m",
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts", help="A .jsonl file, or hub:ORG/NAME[@REVISION][:SPLIT] (repeatable)."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Prompts of each set, over categories.")
    ] = None,
    own: Annotated[
        int, typer.Option("--self", min=0, help="Questions that the target writes itself.")
    ] = 0,
    self_temperature: Annotated[
        float, typer.Option("--self-temperature", help="Temperature of these questions.")
    ] = 1.0,
    self_max_tokens: Annotated[
        int, typer.Option("--self-max-tokens", min=1, help="Longest of these questions.")
    ] = 256,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            "--temperature", help="Every prompt is answered at each (repeatable; default: 0, 0.8)."
        ),
    ] = None,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus, in (0, 1].")] = 0.95,
    responses: Annotated[
        int,
        typer.Option("--responses", min=1, help="Answers to a prompt at a temperature over 0."),
    ] = 1,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Tokens of an answer.")
    ] = 400,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Every seed is derived from it.")] = 0,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            help="Set whose questions must not occur, like --prompts (repeatable; the built-in "
            "one is always among them).",
        ),
    ] = None,
    min_prompt_tokens: Annotated[
        int, typer.Option("--min-prompt-tokens", min=1, help="Shortest user text.")
    ] = 3,
    max_prompt_tokens: Annotated[
        int, typer.Option("--max-prompt-tokens", min=1, help="Longest prompt, with template.")
    ] = 1024,
    max_repetition: Annotated[
        float,
        typer.Option("--max-repetition", help="Share of repeated 3-grams of a prompt's words."),
    ] = 0.5,
    max_similarity: Annotated[
        float,
        typer.Option("--max-similarity", help="Likeness to an earlier prompt; 1 lets all pass."),
    ] = 0.7,
    min_tokens: Annotated[
        int, typer.Option("--min-tokens", min=1, help="Shortest answer, its end token included.")
    ] = 2,
    max_answer_repetition: Annotated[
        float,
        typer.Option(
            "--max-answer-repetition", help="Share of repeated 4-grams of an answer's tokens."
        ),
    ] = 1.0,
    shard_rows: Annotated[
        int, typer.Option("--shard-rows", min=1, help="Answers of a shard before the filters.")
    ] = 500,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Answers at a time.")] = 16,
    draft: DraftOption = "auto",
    url: Annotated[
        str | None,
        typer.Option("--url", help="Ask a server of the OpenAI protocol, up to and with /v1."),
    ] = None,
    url_model: Annotated[
        str | None, typer.Option("--url-model", help="The model's name there (default: --target).")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option("--api-key-env", help="Variable that holds the server's key.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, help="Requests to the server at a time.")
    ] = 16,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    exact: ExactOption = None,
    expert_memory: ExpertMemoryOption = None,
    think: ThinkOption = None,
    effort: EffortOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no notes.")] = False,
) -> None:
    """Make training data: prompts, or questions the target writes, and the target's own answers."""
    from dspark.commands.data_progress import ProgressWatcher
    from dspark.eval.prompts import OWN
    from dspark.training.data_answers import AnswerPlan
    from dspark.training.data_filters import FilterLimits
    from dspark.training.data_run import DataRun
    from dspark.training.data_spec import DataSpec, SelfPlan
    from dspark.training.data_target import describe_target, load_tokenizer

    is_remote = url is not None
    if not is_remote and (url_model is not None or api_key_env is not None):
        raise ConfigError("--url-model or --api-key-env was given, but no --url.")
    server = {"url": url, "url_model": url_model or target} if url is not None else None
    plan = AnswerPlan(
        temperatures=tuple(temperature or (0.0, 0.8)),
        top_p=top_p,
        max_tokens=max_tokens,
        responses=responses,
        seed=seed,
    )
    limits = FilterLimits(
        min_prompt_tokens=min_prompt_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_repetition=max_repetition,
        max_similarity=max_similarity,
        min_tokens=min_tokens,
        max_answer_repetition=max_answer_repetition,
    )
    questions = SelfPlan(count=own, temperature=self_temperature, max_tokens=self_max_tokens)
    sets, excluded = _load_sets(prompts or [], limit), _load_sets([OWN, *(exclude or [])], None)
    codec = load_tokenizer(target, think=think, effort=effort, is_remote=is_remote)
    spec = DataSpec(
        target=describe_target(target, is_remote=is_remote),
        sets=sets,
        excluded=excluded,
        own=questions,
        plan=plan,
        limits=limits,
        shard_rows=shard_rows,
        think=think,
        effort=effort,
        server=server,
    )
    console = ui.stderr_console()
    watcher = ProgressWatcher(console, is_quiet=quiet)

    def load() -> Engine:
        watcher.close()  # only one live display at a time
        return ui.load_engine(
            console,
            target=target,
            draft=draft,
            dtype=dtype,
            device=device,
            threads=threads,
            exact=_exact_as_before(run, exact),
            expert_memory=expert_memory,
            think=think,
            effort=effort,
        )

    answerer = _answerer(load, codec, server, batch, concurrency, api_key_env)
    run = DataRun(out, spec, codec, answerer, watcher=watcher)
    try:
        with watcher:
            manifest = run.run()
    except KeyboardInterrupt:
        kept = f"{run.finished:,} of {run.planned:,} answers" if run.planned else "the questions"
        ui.print_note(
            console,
            f"interrupted; {kept} are kept in {run.folder.path}: run the same command again to go "
            "on from there",
        )
        raise typer.Exit(130) from None
    _print_result(run, manifest, as_json=as_json)


def _load_sets(specs: list[str], limit: int | None) -> tuple[PromptSet, ...]:
    from dspark.eval.prompts import load_prompts

    return tuple(load_prompts(spec).select(limit) for spec in specs)


def _answerer(
    load: Callable[[], Engine],
    codec: TextCodec,
    server: dict[str, str] | None,
    batch: int,
    concurrency: int,
    key_variable: str | None,
) -> Answerer:
    if server is None:
        from dspark.training.data_engine import EngineAnswerer

        return EngineAnswerer(load, batch=batch)
    from dspark.training.data_client import ServerClient
    from dspark.training.data_server import ServerAnswerer

    key = None
    if key_variable is not None:
        key = os.environ.get(key_variable)
        if not key:
            raise ConfigError(f"--api-key-env names {key_variable}, but that variable is not set.")
    client = ServerClient(server["url"], server["url_model"], key=key)
    return ServerAnswerer(client, codec, concurrency=concurrency)


def _exact_as_before(run: DataRun, exact: bool | None) -> bool | None:
    """What exact mode was at first, where the user leaves it open: its probe goes by time."""
    engine = run.folder.manifest["engine"]
    return engine["exact"] if exact is None and engine else exact


def _print_result(run: DataRun, manifest: dict[str, Any], *, as_json: bool) -> None:
    from dspark.commands.data_progress import print_plain, print_table

    rate = run.tokens / run.seconds if run.seconds else 0.0
    figures = {"tokens": run.tokens, "seconds": run.seconds, "tokens_per_second": rate}
    if as_json:
        print(json.dumps({**manifest, "run": figures}, ensure_ascii=False, allow_nan=False))
    elif sys.stdout.isatty():
        print_table(manifest, figures)
    else:
        print_plain(manifest, figures)
