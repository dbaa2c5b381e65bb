"""Write docs/cli.md from the command line itself, or check that the file is up to date.

    python docs/make_cli.py            # writes docs/cli.md
    python docs/make_cli.py --check    # exit status 3 and a diff if docs/cli.md is stale

Nothing in the page is written by hand but `_HEAD` and `_TAIL` below. Loads no model and no torch.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer.main

from dspark.cli import app

PAGE = Path(__file__).with_name("cli.md")

_HEAD = """\
# Command line

<!-- Made by docs/make_cli.py from the commands themselves: edit their help texts, then run it. -->

The result goes to standard output, everything else (progress, statistics, errors) to standard
error. When standard output is not a terminal it holds pure text, or JSON with `--json`.

| exit status | meaning |
|---|---|
| 0 | done |
| 1 | a bug of ours; please report it with the traceback |
| 2 | bad input, or a model that cannot be used: `error:` and often `hint:` on standard error |
| 3 | a check ran and found something |
| 130 | Ctrl-C |
"""

_TAIL = """\
## What options stand for

- `--target`, and `--draft` where it names a model: see [models](models.md).
- `--draft`: see [drafts](drafts.md).
- `--tree-budget`, `--depth`, `--width`: see [trees](trees.md).
- `--rule`, `--seed`, `--exact`, and what logprobs mean: see [losslessness](losslessness.md).
- Fields of the statistics, in `--stats` and `--json`: see [Python](python.md#statistics).

Where `--temperature` and the other sampling options are left out, the model's own defaults are
used if its `generation_config.json` asks for sampling; otherwise the temperature is 0. With
`--temperature 0` they are all ignored.

Inside `dspark chat`, `/reset` forgets the talk, `/stats` shows the last answer's figures,
`/save FILE` writes the talk as JSON and `/exit` ends it. Ctrl-C stops an answer, Ctrl-D ends the
talk.

## Examples

    dspark generate "Name three rivers." --max-tokens 40
    echo "Name three rivers." | dspark generate - --max-tokens 40 --json
    dspark generate "Name three rivers." --max-tokens 40 --temperature 0.8 --seed 7 --n 2 --stats
    dspark generate "The capital of France is" --raw --max-tokens 8 --tree-budget 0
    dspark models --json
"""


def build_page() -> str:
    """Return the whole page."""
    root = typer.main.get_command(app)
    parts = [_HEAD, *_sections(root, "dspark"), _TAIL]
    return "\n".join(parts)


def _sections(command: Any, name: str) -> Iterator[str]:
    """One section per command, groups before their members."""
    yield _section(command, name)
    for child in getattr(command, "commands", {}).values():
        if not child.hidden:
            yield from _sections(child, f"{name} {child.name}")


def _section(command: Any, name: str) -> str:
    usage = [name]
    usage += [_metavar(p) for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    if options:
        usage.append("[OPTIONS]")
    if getattr(command, "commands", None):
        usage.append("[COMMAND]")
    lines = [f"## {name}", "", f"    {' '.join(usage)}", ""]
    if command.help:
        lines += [inspect.cleandoc(command.help), ""]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    if arguments:
        lines += ["| argument | what it is |", "|---|---|"]
        lines += [f"| `{_metavar(p)}` | {_cell(p.help or '')} |" for p in arguments]
        lines.append("")
    if options:
        hints = get_type_hints(inspect.unwrap(command.callback)) if command.callback else {}
        lines += ["| option | default | what it does |", "|---|---|---|"]
        lines += [_option(p, _kind(hints.get(p.name))) for p in options]
        lines.append("")
    return "\n".join(lines)


def _metavar(parameter: Any) -> str:
    name = str(parameter.metavar or parameter.name).upper()
    return name if parameter.required else f"[{name}]"


def _kind(hint: Any) -> str:
    """What to write after an option that takes a value: TEXT, INTEGER or NUMBER."""
    inner = [part for part in get_args(hint) if part is not type(None)]
    if inner:
        return _kind(inner[0])  # of `list[str] | None` or `int | None`
    return {int: "INTEGER", float: "NUMBER"}.get(hint, "TEXT")


def _option(option: Any, kind: str) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    if option.secondary_opts:
        names += " / " + ", ".join(f"`{name}`" for name in option.secondary_opts)
    if not option.is_flag:
        names += f" {kind}"
    return f"| {names} | {_default(option)} | {_cell(option.help or '')} |"


def _default(option: Any) -> str:
    value = option.default
    if value is None or value is False or value == []:
        return ""
    if value is True:
        return f"`{option.opts[0]}`"
    return f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare, exit 3 if stale")
    made = build_page()
    if not parser.parse_args().check:
        PAGE.write_text(made, encoding="utf-8")
        return
    found = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    if found != made:
        diff = difflib.unified_diff(
            found.splitlines(), made.splitlines(), "docs/cli.md", "the commands", lineterm=""
        )
        sys.stderr.write("\n".join(diff) + "\nrun: python docs/make_cli.py\n")
        raise SystemExit(3)


if __name__ == "__main__":
    main()
