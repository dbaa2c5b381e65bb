"""`dspark corpus`: what a target said before, as a draft that needs no training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark.commands import console as ui
from dspark.commands.console import TargetOption
from dspark.errors import DataError

__all__ = ["corpus_command"]


def corpus_command(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Answers of dspark data (.jsonl, .jsonl.gz), or texts in UTF-8.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write; it ends in .safetensors.")],
    target: TargetOption = "smollm2-135m",
) -> None:
    """Make a lookup corpus of a target's own answers; use it with --draft lookup:FILE."""
    from dspark.draft.corpus_file import SUFFIX, write_corpus
    from dspark.eval.results import describe_model
    from dspark.text import vocabulary_fingerprint
    from dspark.training.corpus import read_texts
    from dspark.training.data_target import load_tokenizer

    if out.suffix != SUFFIX:
        raise DataError(f"the file is named {out.name}, but must end in {SUFFIX}.")
    codec = load_tokenizer(target)
    vocabulary = codec.vocabulary()
    texts = read_texts(sources, codec, vocab_size=max(vocabulary.values()) + 1)
    facts = write_corpus(
        out,
        texts,
        target=describe_model(target),
        vocabulary=vocabulary_fingerprint(codec),
    )
    ui.print_note(
        ui.stderr_console(),
        f"{facts['tokens']} tokens of {facts['texts']} texts, "
        f"{out.stat().st_size / 2**20:.1f} MiB; use it with --draft lookup:{out}",
    )
    print(out)
