"""The steps that make `v4-mini`: `python -m dspark.training.pretrain STEP`.

text      collect the text
tokens    train the tokenizer, tokenise the text
train     train the target, in legs
pack      write it as a checkpoint
draft     train a draft module on that checkpoint, in legs
add       write the checkpoint with the draft module
prompts   write prompts of held-out text, for dspark eval
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from dspark.errors import ConfigError, DataError, DsparkError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspark.training.pretrain.legs import Training

__all__ = ["app", "main"]

app = typer.Typer(
    help="Train a small DeepSeek-V4 from scratch, step by step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)

RecipeOption: TypeAlias = Annotated[Path, typer.Option("--recipe", help="The recipe, a TOML file.")]
TokensOption: TypeAlias = Annotated[
    Path, typer.Option("--tokens", help="Folder that `tokens` made.")
]
TextOption: TypeAlias = Annotated[Path, typer.Option("--text", help="Folder that `text` made.")]
ThreadsOption: TypeAlias = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads.")
]
MinutesOption: TypeAlias = Annotated[
    float | None,
    typer.Option("--max-minutes", min=0.0, help="Stop after these minutes; go on another time."),
]

_LOSSES = "held-out.json"  # beside a packed target: figures for the card


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@app.command("text")
def text_command(
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    recipe: RecipeOption,
    docs: Annotated[
        Path | None,
        typer.Option(
            "--docs",
            help="Folder with the documentation's *.rst.txt; by default where Debian's package "
            "python3.11-doc puts them.",
        ),
    ] = None,
    responses: Annotated[
        list[Path] | None, typer.Option("--responses", help="Response file; may be repeated.")
    ] = None,
    responses_model: Annotated[
        str, typer.Option("--responses-model", help="Model whose tokens the response files hold.")
    ] = "smollm2-135m",
) -> None:
    """Collect the standard library's sources, its documentation, and answers to prompts."""
    from itertools import chain

    from dspark.training.pretrain import text
    from dspark.training.pretrain.settings import read_recipe

    holdout = read_recipe(recipe).text.holdout
    found = text.find_documentation() if docs is None else docs
    notes = {"documentation": "none" if found is None else "python documentation, *.rst.txt"}
    sources = [text.python_sources()]
    if found is not None:
        sources.append(text.documentation_sources(found))
    if responses:
        notes["responses"] = f"{', '.join(p.name for p in responses)}, tokens of {responses_model}"
        sources.append(text.response_documents(responses, _decoder(responses_model)))
    manifest = text.collect(out, chain(*sources), holdout=holdout, notes=notes)
    sizes = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in manifest["bytes"].items())
    _say(f"{len(manifest['files'])} documents: {sizes}")


@app.command("tokens")
def tokens_command(
    source: Annotated[Path, typer.Argument(help="Folder that `text` made.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    recipe: RecipeOption,
) -> None:
    """Train the tokenizer on the training split, and tokenise both splits."""
    from dspark.training.pretrain.settings import read_recipe
    from dspark.training.pretrain.text import read_documents
    from dspark.training.pretrain.tokenizer import Tokens, save_tokenizer, train_tokenizer

    settings = read_recipe(recipe)
    documents = read_documents(source)
    texts = [document.text for document in documents if document.split == "train"]
    tokenizer = train_tokenizer(texts, settings.text.vocabulary)
    save_tokenizer(tokenizer, out, max_positions=settings.model.max_position_embeddings)
    tokens = Tokens.encode(documents, tokenizer)
    tokens.save(out)
    for (split, kind), stream in tokens.streams.items():
        _say(f"{split} {kind}: {stream.documents} documents, {len(stream.tokens):,} tokens")


@app.command("train")
def train_command(
    out: Annotated[Path, typer.Argument(help="Folder of the run: states and log.")],
    recipe: RecipeOption,
    tokens: TokensOption,
    max_minutes: MinutesOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Train the target, from where the last leg ended."""
    from dspark.training.pretrain.settings import read_recipe
    from dspark.training.pretrain.tokenizer import Tokens
    from dspark.training.pretrain.trainer import TargetTraining

    _set_threads(threads)
    _run(TargetTraining(read_recipe(recipe), Tokens.load(tokens)), out, max_minutes)


@app.command("pack")
def pack_command(
    run: Annotated[Path, typer.Argument(help="Folder of the target's run.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write; new or empty.")],
    recipe: RecipeOption,
    tokens: TokensOption,
    text: TextOption,
) -> None:
    """Pack the trained target as a checkpoint, and compare its held-out loss."""
    from dspark.training.pretrain import export
    from dspark.training.pretrain.card import model_card
    from dspark.training.pretrain.draft_trainer import read_target
    from dspark.training.pretrain.network import official_tensors
    from dspark.training.pretrain.settings import draft_config, read_recipe
    from dspark.training.pretrain.state import read_log
    from dspark.training.pretrain.tokenizer import Tokens
    from dspark.training.pretrain.trainer import load_network, text_losses

    settings, stream = read_recipe(recipe), Tokens.load(tokens)
    config = draft_config(settings.model, "none")
    network, _ = load_network(settings.model, run)
    stage = replace(settings.stages[-1], experts="float32")
    rows = settings.run.validation_rows
    losses = {"trained": text_losses(network, stream, stage, rows=rows)}
    manifest, logs = _read_json(text / "manifest.json"), {"target": read_log(run)}
    tensors = official_tensors(network)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        first = Path(work) / "packed"
        export.pack(first, config, tensors, tokens, "")
        packed = read_target(first, config)
        losses["packed"] = text_losses(packed, stream, stage, rows=rows)
    size = export.pack(out, config, tensors, tokens, model_card(config, manifest, logs, losses))
    _write_json(out / _LOSSES, losses)
    for name, values in losses.items():
        _say(f"{name}: " + ", ".join(f"{kind} {value:.3f}" for kind, value in values.items()))
    _say(f"{out}: {size / 1e6:.1f} MB")


@app.command("draft")
def draft_command(
    kind: Annotated[str, typer.Argument(help="dspark or mtp.")],
    out: Annotated[Path, typer.Argument(help="Folder of the run: states and log.")],
    target: Annotated[Path, typer.Option("--target", help="Checkpoint that `pack` wrote.")],
    recipe: RecipeOption,
    tokens: TokensOption,
    max_minutes: MinutesOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Train a draft module on the packed target, from where the last leg ended."""
    from dspark.training.pretrain.draft_trainer import DraftTraining, read_target
    from dspark.training.pretrain.settings import draft_config, read_recipe
    from dspark.training.pretrain.tokenizer import Tokens

    _set_threads(threads)
    settings = read_recipe(recipe)
    network = read_target(target, draft_config(settings.model, "none"))
    _run(DraftTraining(settings, kind, network, Tokens.load(tokens)), out, max_minutes)


@app.command("add")
def add_command(
    kind: Annotated[str, typer.Argument(help="dspark or mtp.")],
    run: Annotated[Path, typer.Argument(help="Folder of the draft's run.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write; new or empty.")],
    target: Annotated[Path, typer.Option("--target", help="Checkpoint that `pack` wrote.")],
    target_run: Annotated[Path, typer.Option("--target-run", help="Folder of the target's run.")],
    recipe: RecipeOption,
    text: TextOption,
) -> None:
    """Write the packed target and its draft module as one checkpoint."""
    from dspark.training.pretrain import export
    from dspark.training.pretrain.card import model_card
    from dspark.training.pretrain.settings import draft_config, read_recipe
    from dspark.training.pretrain.state import read_log

    config = draft_config(read_recipe(recipe).model, kind)
    logs = {"target": read_log(target_run), kind: read_log(run)}
    losses = _read_json(target / _LOSSES)
    card = model_card(config, _read_json(text / "manifest.json"), logs, losses)
    size = export.add_draft(out, target, config, export.draft_tensors(run, kind, config), card)
    _say(f"{out}: {size / 1e6:.1f} MB")


@app.command("prompts")
def prompts_command(
    source: Annotated[Path, typer.Argument(help="Folder that `text` made.")],
    out: Annotated[Path, typer.Argument(help="JSON lines to write.")],
    kind: Annotated[list[str], typer.Option("--kind", help="code, docs or chat; repeatable.")],
) -> None:
    """Write a prompt of every held-out document: lines from its middle, or the user's question."""
    from dspark.training.pretrain.prompts import held_out_prompts
    from dspark.training.pretrain.text import KINDS, read_documents

    unknown = [name for name in kind if name not in KINDS]
    if unknown:
        raise ConfigError(f"the kind is {unknown[0]!r}, but must be one of {', '.join(KINDS)}.")
    rows = list(held_out_prompts(read_documents(source), kind))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    out.write_text("".join(lines), encoding="utf-8")
    _say(f"{len(rows)} prompts")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise DataError(f"{path} cannot be read as JSON: {exc}.") from exc


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _run(training: Training, out: Path, max_minutes: float | None) -> None:
    """Do a leg and say where it ended."""
    from dspark.training.pretrain.legs import Leg, run_leg

    result = run_leg(training, out, Leg(max_minutes=max_minutes), _say)
    state = "done" if result.is_done else "to be continued by the same command"
    _say(
        f"step {result.step} of {result.total}, {result.tokens:,} tokens, "
        f"{result.seconds / 3600:.2f} hours of training in all: {state}"
    )


def _decoder(model: str) -> Callable[[list[int]], str]:
    from dspark.models.resolve import resolve_model
    from dspark.text import load_codec

    codec = load_codec(resolve_model(model))
    if codec is None:
        raise ConfigError(f"{model} has no tokenizer.")
    return codec.decode


def main() -> None:
    """Run a step; our errors are one sentence and exit code 2."""
    try:
        app(standalone_mode=True)
    except DsparkError as exc:
        _say(f"error: {exc.message}")
        if exc.hint:
            _say(f"hint: {exc.hint}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
