"""`dspark convert-draft`: write a draft in the layout of another program."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark.commands import console as ui
from dspark.draft.formats.programs import Program
from dspark.errors import CapabilityError, ConfigError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from dspark.draft.formats.borrow import Lender
    from dspark.draft.formats.stored import TargetFacts
    from dspark.target import SharesHeadRows, TargetInfo

__all__ = ["convert_draft_command"]


def convert_draft_command(
    source: Annotated[
        str,
        typer.Argument(help="Draft module: folder or hub id, in any layout that --draft takes."),
    ],
    dest: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    to: Annotated[Program, typer.Option("--to", help="Who will read it.")],
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="Model that the draft is for: alias, folder, .gguf file or hub id (default: the "
            "one that the draft names).",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="float32, bfloat16, float16, or auto: the narrowest that changes no weight.",
        ),
    ] = "auto",
) -> None:
    """Convert a DSpark, DFlash or EAGLE-3 draft; print the folder.

    For vllm and sglang the folder also has serve.sh, which starts the server.
    """
    from dspark.draft.formats.convert import convert_draft
    from dspark.draft.formats.fields import read_config
    from dspark.draft.formats.stored import facts_of

    console = ui.stderr_console()
    folder = _folder(source)
    facts = facts_of(read_config(folder))
    name = target or facts.name
    made = convert_draft(
        folder,
        dest,
        to,
        info=facts.info() if target is None else _target_info(target, facts),
        lender=_lender(name, console),
        target=name,
        dtype=dtype,
    )
    for note in made.notes:
        ui.print_note(console, note)
    if made.script is not None:
        ui.print_note(console, f"to serve: {made.folder / 'serve.sh'}")
    print(made.folder)


def _folder(source: str) -> Path:
    """A draft's folder; one that is there is not checked as a model's would be."""
    from dspark.models.resolve import resolve_model

    path = Path(source).expanduser()
    return path if path.is_dir() else resolve_model(source)


def _target_info(target: str, facts: TargetFacts) -> TargetInfo:
    """A target's facts from its config.json, without its weights."""
    from dataclasses import replace

    from dspark.draft.formats.fields import Fields, read_config
    from dspark.models.resolve import resolve_model

    folder = resolve_model(target)
    config = read_config(folder)
    text = config.get("text_config")
    fields = Fields(text if isinstance(text, dict) else config, folder / "config.json")
    return replace(
        facts,
        name=target,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        num_layers=fields.integer("num_hidden_layers"),
    ).info()


def _lender(name: str | None, console: Console) -> Lender:
    """Loads the target once, when it is asked for, in the dtype that the draft is stored in."""

    @cache
    def load(dtype: torch.dtype) -> SharesHeadRows:
        from dspark.models.resolve import resolve_model
        from dspark.registry import LoadOptions, load_target
        from dspark.target import SharesHeadRows

        if name is None:
            raise ConfigError(
                "the layout asks for the target's embedding or head, but the draft does not name "
                "its target.",
                hint="name it: --target NAME",
            )
        folder = resolve_model(name)
        kind = str(dtype).removeprefix("torch.")
        options = LoadOptions(name=name, dtype=kind, exact=False, has_many_rows=True)
        with ui.loading(console, f"loading {name}"):
            loaded = load_target(folder, options).target
        if not isinstance(loaded, SharesHeadRows):
            raise CapabilityError(f"{name} does not give away its embedding and output head.")
        return loaded

    return load
