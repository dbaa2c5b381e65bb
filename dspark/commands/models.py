"""`dspark models`: list the aliases, fetch them, remove them, say where they are."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from dspark.errors import CheckpointError
from dspark.models import ModelListing, find_cached, list_models, remove_model, resolve_model
from dspark.models.aliases import get_alias
from dspark.models.shipped import shipped_drafts
from dspark.models.text import format_bytes

__all__ = ["app"]

app = typer.Typer(
    name="models",
    help="List the models that have a short name; fetch or remove them.",
    pretty_exceptions_show_locals=False,
)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="Short name of a model.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_ACCEPTS = "a short name, a folder with safetensors weights, a .gguf file, or a hub id org/name"


@app.callback(invoke_without_command=True)
def show(context: typer.Context, as_json: _Json = False) -> None:
    """List short names, model families, and what is in the cache."""
    if context.invoked_subcommand is not None:
        return
    listings, families = list_models(), _families()
    if as_json:
        drafts = [{"name": name, "target": target} for name, target in shipped_drafts().items()]
        models = [_record(listing) for listing in listings]
        print(json.dumps({"schema": 1, "models": models, "drafts": drafts, **families}))
    elif sys.stdout.isatty():
        _print_table(listings, families)
    else:
        for listing in listings:
            print("\t".join(str(value) for value in _cells(listing)))


@app.command()
def fetch(
    name: _Name,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Download a model into the cache and print its folder."""
    get_alias(name)
    print(resolve_model(name, progress=False if quiet else None))


@app.command()
def remove(name: _Name) -> None:
    """Remove a model from the cache."""
    folder = _cached(name)
    remove_model(folder)
    print(f"removed {folder}")


@app.command()
def path(name: _Name) -> None:
    """Print the folder of a model that is in the cache."""
    print(_cached(name))


def _cached(name: str) -> Any:
    folder = find_cached(name)
    if folder is None:
        raise CheckpointError(
            f"{name} is not in the cache.", hint=f"run: dspark models fetch {name}"
        )
    return folder


def _families() -> dict[str, list[str]]:
    from importlib.metadata import entry_points

    return {"families": sorted({point.name for point in entry_points(group="dspark.adapters")})}


def _record(listing: ModelListing) -> dict[str, Any]:
    alias = listing.alias
    return {
        "name": alias.name,
        "description": alias.description,
        "family": alias.family,
        "licence": alias.licence,
        "cached": listing.is_cached,
        "path": str(listing.path) if listing.path else None,
        "download_bytes": alias.download_bytes,
        "disk_bytes": listing.disk_bytes,
    }


def _cells(listing: ModelListing) -> tuple[str, ...]:
    alias = listing.alias
    to_fetch = f"{format_bytes(alias.download_bytes)} to fetch"
    state = "cached" if listing.is_cached else to_fetch
    if alias.is_shipped:
        state = "in the package"
    size = format_bytes(listing.disk_bytes)
    return alias.name, alias.family, state, size, alias.licence, alias.description


def _print_table(listings: list[ModelListing], families: dict[str, list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("name", "family", "state", "on disk", "licence", "what it is"):
        table.add_column(title)
    for listing in listings:
        table.add_row(*_cells(listing), style=None if listing.is_cached else "dim")
    console = Console()
    console.print(table)
    drafts = ", ".join(f"{name} (for {target})" for name, target in shipped_drafts().items())
    console.print(f"\ndrafts in the package: {drafts}", highlight=False)
    console.print(f"families: {', '.join(families['families'])}", highlight=False)
    console.print(f"--target also takes {_ACCEPTS}", highlight=False, markup=False)
