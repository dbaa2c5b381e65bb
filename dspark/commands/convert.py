"""`dspark convert`: write a DeepSeek-V4 checkpoint in another layout or weight format."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["convert"]


class _To(StrEnum):
    OFFICIAL = "official"
    TRANSFORMERS = "transformers"


class _Weights(StrEnum):
    KEEP = "keep"
    FP4 = "fp4"
    FP8 = "fp8"
    BF16 = "bf16"
    FLOAT32 = "float32"


def convert(
    source: Annotated[
        Path, typer.Argument(help="Folder of a DeepSeek-V4 checkpoint, in either layout.")
    ],
    dest: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    to: Annotated[_To, typer.Option("--to", help="How to name the tensors.")],
    weights: Annotated[
        _Weights,
        typer.Option(
            "--weights",
            help="keep; fp4: FP4 experts and FP8 linears, as released; fp8: FP8 experts, too; "
            "bf16 or float32: not quantised.",
        ),
    ] = _Weights.KEEP,
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Size of a file, such as 5GB.")
    ] = "5GB",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Convert a DeepSeek-V4 checkpoint, one tensor at a time; print the folder."""
    from dspark.base_model.checkpoint import Layout
    from dspark.base_model.convert import WeightFormat, convert_checkpoint
    from dspark.models.progress import open_progress
    from dspark.models.text import parse_bytes

    shard_bytes = parse_bytes(shard_size)
    with open_progress(False if quiet else None) as sink:
        is_started = False

        def report(done: int, total: int) -> None:
            nonlocal is_started
            if not is_started:
                sink.stage("converting", total)
                is_started = True
            sink.advance_to(done)

        result = convert_checkpoint(
            source,
            dest,
            layout=Layout(to.value),
            weights=WeightFormat(weights.value),
            shard_bytes=shard_bytes,
            progress=report,
        )
    print(result.folder)
