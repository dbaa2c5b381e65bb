"""`dspark generate`: answer a prompt."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark.commands import console as ui
from dspark.commands.console import (
    DeviceOption,
    DraftOption,
    DraftQuantOption,
    DtypeOption,
    EffortOption,
    ExactOption,
    ExpertMemoryOption,
    GrammarOption,
    JsonSchemaOption,
    JsonWhitespaceOption,
    QuantOption,
    RegexOption,
    TargetOption,
    ThinkOption,
    ThreadsOption,
)
from dspark.commands.structured import asked_grammar, compiled
from dspark.errors import ConfigError
from dspark.request import FinishReason, GenerationResult, Prompt, Rule, SamplingParams

if TYPE_CHECKING:
    from rich.console import Console

    from dspark.engine import Engine
    from dspark.text import TextCodec

__all__ = ["generate"]


def generate(  # noqa: PLR0913 - one parameter per option is how Typer works
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads standard input.")
    ] = None,
    file: Annotated[
        list[str] | None, typer.Option("--file", help="Read a prompt from a file (repeatable).")
    ] = None,
    target: TargetOption = "smollm2-135m",
    draft: DraftOption = "auto",
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens to generate.")] = 256,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 is greedy (default: the model's own).")
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Nucleus, in (0, 1].")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="0 keeps all tokens.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", help="In [0, 1].")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the noise.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text (repeatable).")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Samples.")] = 1,
    json_schema: JsonSchemaOption = None,
    json_whitespace: JsonWhitespaceOption = "free",
    regex: RegexOption = None,
    grammar: GrammarOption = None,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="With --json: alternatives per token.")
    ] = None,
    tree_budget: Annotated[
        int | None, typer.Option("--tree-budget", help="Drafted nodes per round; 0 is plain.")
    ] = None,
    depth: Annotated[int | None, typer.Option("--depth", help="Longest drafted path.")] = None,
    width: Annotated[
        int | None, typer.Option("--width", help="Children per node; 1 is a chain.")
    ] = None,
    rule: Annotated[
        str,
        typer.Option("--rule", help="auto, greedy, coupled, sample-match, rejection or block."),
    ] = "auto",
    dtype: DtypeOption = "auto",
    quant: QuantOption = "none",
    draft_quant: DraftQuantOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    exact: ExactOption = None,
    expert_memory: ExpertMemoryOption = None,
    think: ThinkOption = None,
    effort: EffortOption = None,
    auto_off: Annotated[
        bool, typer.Option("--auto-off/--no-auto-off", help="Stop drafting while it loses.")
    ] = True,
    show_accepted: Annotated[
        bool, typer.Option("--show-accepted", help="Tint accepted draft tokens.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print statistics to stderr.")] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Decode plainly too and compare: exit 3 if texts differ."),
    ] = False,
    side_by_side: Annotated[
        bool,
        typer.Option("--side-by-side", help="--compare, with both answers shown as they come."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per sample.")
    ] = False,
) -> None:
    """Answer a prompt with a target model, sped up by a draft; the text is the target's own."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature if temperature is not None else 0.0,
        top_p=1.0 if top_p is None else top_p,
        top_k=0 if top_k is None else top_k,
        min_p=0.0 if min_p is None else min_p,
        seed=seed,
        stop=tuple(stop or ()),
        n=n,
        logprobs=logprobs,
        rule=rule,
        tree_budget=tree_budget,
        depth=depth,
        width=width,
    )
    if temperature is not None:
        _ = params.resolved_rule  # refuse a contradiction before a model is loaded
    asked = asked_grammar(json_schema, regex, grammar, whitespace=json_whitespace)
    compare = compare or side_by_side
    texts = _prompts(prompt, file)
    _check_comparison(rule, compare=compare)
    if side_by_side:
        _check_single(is_single=len(texts) == 1 and n == 1 and not as_json)
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
        think=think,
        effort=effort,
        auto_off=auto_off,
        has_costs=True,
    )
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    params = with_model_defaults(params, engine, given)
    params = replace(params, grammar=compiled(asked, engine.codec))
    prompts = [as_prompt(engine, text, system=system, raw=raw) for text in texts]
    plain: list[GenerationResult] | None = None
    if side_by_side:
        first, *rest = _show_both(engine, prompts[0], params)
        plain, results = [first], rest or [first]
    elif len(prompts) == 1 and n == 1 and not as_json:
        results = [_stream(engine, prompts[0], params, show_accepted=show_accepted)]
    else:
        results = _run_all(engine, prompts, params)
        is_chat = not isinstance(prompts[0], str)
        _print_all(results, as_json, console, engine.codec if is_chat else None)
    if stats:
        ui.print_stats(console, engine, results)
    _note_cut_texts(console, params, results)
    if any(result.error for result in results):
        raise typer.Exit(2)
    if any(result.finish_reason is FinishReason.CANCELLED for result in results):
        raise typer.Exit(130)
    if compare:
        plain = plain or _decode_plainly(engine, prompts, params, results, console)
        if not _is_same_as_plain(engine, plain, results, console):
            raise typer.Exit(3)


def _note_cut_texts(
    console: Console, params: SamplingParams, results: list[GenerationResult]
) -> None:
    is_cut = any(result.finish_reason is FinishReason.LENGTH for result in results)
    if params.grammar is not None and is_cut:
        ui.print_note(console, "an answer was cut before its grammar was complete: --max-tokens")


def _run_all(
    engine: Engine, prompts: list[Prompt], params: SamplingParams
) -> list[GenerationResult]:
    """Run all prompts; a Ctrl-C ends the answers and keeps what there is of each."""
    requests = [r for i, p in enumerate(prompts) for r in engine.submit(p, params, prompt_index=i)]
    try:
        while engine.num_unfinished:
            engine.step()
    except KeyboardInterrupt:
        for request in requests:
            engine.cancel(request)
    return [request.result() for request in requests]


def _check_comparison(rule: str, *, compare: bool) -> None:
    if compare and rule in (Rule.REJECTION, Rule.BLOCK):
        raise ConfigError(
            f"--compare was given with rule {rule}, whose text may differ from plain decoding's.",
            hint="compare under --rule coupled or sample-match",
        )


def _check_single(*, is_single: bool) -> None:
    if not is_single:
        raise ConfigError(
            "--side-by-side was given for several answers or --json, but shows one prompt's answer."
        )


def _show_both(engine: Engine, prompt: Prompt, params: SamplingParams) -> list[GenerationResult]:
    from rich.console import Console

    from dspark.commands.side_by_side import show_both

    return show_both(engine, prompt, params, Console())


def _decode_plainly(
    engine: Engine,
    prompts: list[Prompt],
    params: SamplingParams,
    results: list[GenerationResult],
    console: Console,
) -> list[GenerationResult]:
    """Decode plainly with the seeds of the results."""
    seeds = [result.seed for result in results if result.sample_index == 0]
    own = [replace(params, draft=False, seed=seed) for seed in seeds]
    with ui.loading(console, "decoding plainly to compare"):
        return engine.generate(prompts, own)


def _is_same_as_plain(
    engine: Engine,
    plain: list[GenerationResult],
    results: list[GenerationResult],
    console: Console,
) -> bool:
    """Say whether the tokens are those of plain decoding, and how fast both were."""
    from dspark.commands.side_by_side import decoding_speed

    same = sum(a.token_ids == b.token_ids for a, b in zip(results, plain, strict=True))
    tokens = sum(len(result.token_ids) for result in results)
    is_same = same == len(results)
    verdict = "[green]same text[/]" if is_same else "[bold red]another text[/]"
    count = "" if len(results) == 1 else f" in {same} of {len(results)} samples"
    console.print(
        f"plain decoding gives the {verdict}{count} ({tokens} tokens): "
        f"{decoding_speed(plain):.1f} tok/s plainly, {decoding_speed(results):.1f} tok/s with the "
        "draft"
    )
    if not is_same and not engine.target.exactness.enabled:
        console.print("exact mode is off, so near-ties may fall the other way: try --exact")
    return is_same


def with_model_defaults(
    params: SamplingParams, engine: Engine, given: dict[str, Any]
) -> SamplingParams:
    """Fill in what the user did not give from the model's own sampling defaults."""
    own: dict[str, Any] = {
        k: v for k, v in engine.sampling_defaults.items() if given.get(k) is None
    }
    if given.get("temperature") == 0:
        own = {}
    if "top_k" in own:
        own["top_k"] = int(own["top_k"])
    return replace(params, **own)


def as_prompt(engine: Engine, text: str, *, system: str | None, raw: bool) -> Prompt:
    """Raw text, or chat messages where the model has a template and `raw` is off."""
    codec = engine.codec
    has_template = codec is not None and codec.has_chat_template
    if raw or not has_template:
        if system is not None:
            why = "--raw leaves no place for one" if raw else "the model has no chat template"
            raise ConfigError(f"a system message was given, but {why}.")
        return text
    messages = [] if system is None else [{"role": "system", "content": system}]
    if not text:
        return text  # the engine refuses it
    return [*messages, {"role": "user", "content": text}]


def _prompts(prompt: str | None, files: list[str] | None) -> list[str]:
    if prompt is not None and files:
        raise ConfigError("a prompt and --file were both given, but one of them is enough.")
    if files:
        return [ui.read_text(path) for path in files]
    if prompt is None:
        raise ConfigError(
            "no prompt was given.", hint='run: dspark generate "your question", or use --file'
        )
    return [ui.read_text("-") if prompt == "-" else prompt]


def _stream(
    engine: Engine, prompt: Prompt, params: SamplingParams, *, show_accepted: bool
) -> GenerationResult:
    """Print an answer as it comes; a Ctrl-C ends the answer and keeps what there is."""
    tint = show_accepted and sys.stdout.isatty()
    result: GenerationResult | None = None
    (request,) = engine.submit(prompt, params)
    try:
        for chunk in engine.follow(request):
            for piece in chunk.pieces:
                if tint and piece.is_drafted:
                    sys.stdout.write(f"\x1b[32m{piece.text}\x1b[0m")
                else:
                    sys.stdout.write(piece.text)
            sys.stdout.flush()
            result = chunk.result
    except KeyboardInterrupt:
        engine.cancel(request)
        sys.stdout.write("".join(piece.text for piece in request.pieces))
    if sys.stdout.isatty() or result is not None:
        sys.stdout.write("\n")
    sys.stdout.flush()
    return request.result() if result is None else result


def result_json(result: GenerationResult, codec: TextCodec | None = None) -> dict[str, Any]:
    """A result as the object that --json prints.

    Args:
        result: The result.
        codec: Of a chat answer; if it finds reasoning or tool calls in it, they stand in "message".
    """
    stats = asdict(result.stats)
    stats.pop("round_log")
    stats["accepted_length"] = result.stats.accepted_length
    out: dict[str, Any] = {
        "prompt_index": result.prompt_index,
        "sample_index": result.sample_index,
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason.value,
        "seed": result.seed,
        "stats": stats,
    }
    if codec is not None and result.error is None:
        message = codec.assistant_message(result.text, result.token_ids)
        if message.keys() - {"role", "content"}:
            out["message"] = message
    if result.logprobs is not None:
        out["logprobs"] = [
            {"token_id": item.token_id, "logprob": item.logprob, "top": item.top}
            for item in result.logprobs
        ]
    if result.error is not None:
        out["error"], out["hint"] = result.error, result.hint
    return out


def _print_all(
    results: list[GenerationResult], as_json: bool, console: Console, codec: TextCodec | None
) -> None:
    for result in results:
        if as_json:
            print(json.dumps(result_json(result, codec), ensure_ascii=False))
        elif result.error is None:
            if len(results) > 1:
                name = f"prompt {result.prompt_index}, sample {result.sample_index}"
                ui.print_note(console, name)
            print(result.text)
        if result.error is not None:
            ui.print_error(console, result.error, result.hint)
