"""`dspark calibrate`: fit survival maps of a draft and keep them beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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
    QuantOption,
    TargetOption,
    ThinkOption,
    ThreadsOption,
)
from dspark.errors import CapabilityError, ConfigError, DataError
from dspark.request import SamplingParams

if TYPE_CHECKING:
    from rich.console import Console

    from dspark.engine import Engine
    from dspark.eval.calibrate import Cell
    from dspark.eval.prompts import PromptSet

__all__ = ["calibrate_command"]

SCHEMA = "dspark.calibrate"
VERSION = 1
_GOAL = 0.02  # ECE of a position after calibration


def calibrate_command(  # noqa: PLR0913 - one parameter per option is how Typer works
    target: TargetOption = "smollm2-135m",
    draft: DraftOption = "auto",
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts",
            help="A .jsonl file, hub:ORG/NAME[@REVISION][:SPLIT], or dspark for the built-in set.",
        ),
    ] = "dspark",
    limit: Annotated[
        int | None, typer.Option("--limit", min=2, help="Questions, over categories.")
    ] = None,
    first_turn: Annotated[
        bool, typer.Option("--first-turn", help="Ask the first turn of each question only.")
    ] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens of an answer.")] = 256,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            help="auto, greedy, coupled, sample-match, rejection or block (repeatable; default: "
            "coupled and rejection). At temperature 0 all are greedy.",
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option("--temperature", help="0 is greedy (repeatable; default: 0 and 1)."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", help="chain or tree (repeatable; default: both)."),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option("--width", min=1, help="Children per node of a tree (default: the draft's)."),
    ] = None,
    tree_budget: Annotated[
        int | None,
        typer.Option("--tree-budget", min=1, help="Nodes of a tree (default: the engine's)."),
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=1, help="Longest drafted path (default: 8).")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Every question's seed is derived from it.")
    ] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Questions at a time.")] = 1,
    folds: Annotated[
        int,
        typer.Option("--folds", min=2, help="Each judged by a map fitted on the other questions."),
    ] = 4,
    to_sglang: Annotated[
        str | None,
        typer.Option(
            "--to-sglang", help="Write the temperatures of one kind of chain in SGLang's STS form."
        ),
    ] = None,
    from_sglang: Annotated[
        str | None,
        typer.Option(
            "--from-sglang", help="Read SGLang's STS file for one kind of chain; measure nothing."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Leave the file beside the draft as it is.")
    ] = False,
    dtype: DtypeOption = "auto",
    quant: QuantOption = "none",
    draft_quant: DraftQuantOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    exact: ExactOption = None,
    expert_memory: ExpertMemoryOption = None,
    think: ThinkOption = None,
    effort: EffortOption = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Write the results as JSON to this file.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no notes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Fit how likely drafted tokens are to be accepted, and keep it beside the draft."""
    from dspark.eval.calibrate import cells_of
    from dspark.eval.prompts import load_prompts
    from dspark.eval.results import RunFacts, build_header, write_results

    asked = load_prompts(prompts).select(limit, first_turn=first_turn)
    base = SamplingParams(max_tokens=max_tokens, width=width, tree_budget=tree_budget, depth=depth)
    cells = cells_of(
        base, rule or ["coupled", "rejection"], temperature or [0.0, 1.0], shape or _shapes(width)
    )
    _check_files(to_sglang, from_sglang, out, cells)
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
    )
    folder, target_folder = _folders(engine, target=target, draft=draft)
    if to_sglang is not None:
        _check_export(engine, depth)
    has_template = engine.codec is not None and engine.codec.has_chat_template
    is_raw = raw or not has_template
    facts = RunFacts(
        target=target,
        template="raw" if is_raw else "chat",
        drafts=(draft,),
        params=tuple(cell.params for cell in cells),
        prompts=(asked,),
        think=think,
        effort=effort,
        seed=seed,
        batch=batch,
    )
    run = _Run(engine, asked, num_folds=folds, seed=seed, batch=batch, is_raw=is_raw)
    is_interrupted = False
    try:
        if from_sglang is not None:
            run.take_from(from_sglang, cells[0])
        else:
            with _progress(console, cells, asked, is_on=not quiet) as report:
                for cell in cells:
                    run.measure(cell, report(cell))
    except KeyboardInterrupt:
        is_interrupted = True
    if run.entries and not dry_run:
        _keep(console, run, folder, target_folder, target=target, is_quiet=quiet)
    if is_interrupted:
        finished = len(run.entries)
        ui.print_note(console, f"interrupted: {finished} of {len(cells)} maps had been fitted")
        raise typer.Exit(130)
    results = {
        "schema": SCHEMA,
        "version": VERSION,
        "header": build_header(engine, facts),
        "maps": run.entries,
        "failed": run.failed,
    }
    if out is not None:
        write_results(out, results)
    if to_sglang is not None:
        _export(to_sglang, engine, run.entries[0]["sts"])
    _show(results, as_json=as_json)
    _finish(console, run, is_quiet=quiet)


class _Run:
    """The maps fitted so far.

    Args:
        engine: The target and the draft.
        prompts: The questions.
        how: Of `dspark.eval.calibrate.measure`.
    """

    def __init__(self, engine: Engine, prompts: PromptSet, **how: Any) -> None:
        self.entries: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        self._engine = engine
        self._prompts = prompts
        self._how = how

    def measure(self, cell: Cell, report: Callable[[float], None] | None) -> None:
        """Observe a cell and fit its map."""
        from dspark.eval.calibrate import calibrate, measure

        seen = measure(self._engine, cell, self._prompts, on_progress=report, **self._how)
        self.entries.append(calibrate(cell.key, seen, dataset=self._prompts.name))
        self.failed += [{"map": cell.key.name, **failure} for failure in seen.failed]

    def take_from(self, path: str, cell: Cell) -> None:
        """Read a cell's map from a file of SGLang's."""
        from dspark.eval.calibrate import imported
        from dspark.eval.calibrate_sglang import map_of, read_sglang

        sts = read_sglang(path, depth=_confidence_depth(self._engine))
        self.entries.append(imported(cell.key, map_of(sts["temperatures"]), sts))


def _shapes(width: int | None) -> list[str]:
    return ["chain"] if width == 1 else ["chain", "tree"]


def _check_files(
    to_sglang: str | None, from_sglang: str | None, out: str | None, cells: Sequence[Cell]
) -> None:
    """Refuse what cannot be written, or has no one meaning, before time is spent."""
    for option, path in (("--to-sglang", to_sglang), ("--from-sglang", from_sglang)):
        if path is not None and (len(cells) != 1 or not cells[0].key.is_chain):
            raise ConfigError(
                f"{option} goes with one kind of chain, but {len(cells)} maps were asked for.",
                hint="add for instance: --rule rejection --temperature 1 --shape chain",
            )
    for path in (to_sglang, out):
        if path is not None and not Path(path).expanduser().absolute().parent.is_dir():
            raise DataError(f"{path} cannot be written: there is no such folder.")


def _folders(engine: Engine, *, target: str, draft: str) -> tuple[Path, Path]:
    """Where the draft's weights and the target's are.

    Raises:
        CapabilityError: If the draft has no weights, or there are two of them.
    """
    from dspark.draft.grow import GrowsTrees
    from dspark.models.resolve import resolve_model

    if not isinstance(engine.drafter, GrowsTrees):
        raise CapabilityError(
            f"draft {engine.drafter.name} cannot be calibrated: its survival does not come from "
            "one network's laws.",
            hint="name one draft module or model; a map is used in combinations with lookup, too",
        )
    target_folder = Path(resolve_model(target))
    return (target_folder if draft == "auto" else Path(resolve_model(draft))), target_folder


def _confidence_depth(engine: Engine) -> int:
    """Tokens that the draft's confidence head rates.

    Raises:
        CapabilityError: If it has none.
    """
    depth = int(getattr(engine.drafter, "confidence_depth", 0))
    if not depth:
        raise CapabilityError(
            f"draft {engine.drafter.name} has no confidence head, which SGLang's temperatures are "
            "for."
        )
    return depth


def _check_export(engine: Engine, depth: int | None) -> None:
    """Refuse a list of temperatures that would not cover the block, before time is spent.

    Raises:
        CapabilityError: If the draft has no confidence head.
        ConfigError: If shorter paths were asked for.
    """
    needed = _confidence_depth(engine)
    asked = engine.config.limits.depth if depth is None else depth
    if asked < needed:
        raise ConfigError(
            f"depth is {asked}, but SGLang needs a temperature for each of the block's {needed} "
            "tokens.",
            hint=f"add --depth {needed}",
        )


def _export(path: str, engine: Engine, sts: dict[str, Any]) -> None:
    from dspark.eval.calibrate_sglang import write_sglang

    seen, needed = len(sts["temperatures"]), _confidence_depth(engine)
    if seen != needed:
        raise DataError(
            f"{path} was not written: {seen} of the block's {needed} positions were observed.",
            hint="give longer answers: --max-tokens",
        )
    write_sglang(path, sts)


def _keep(
    console: Console, run: _Run, folder: Path, target_folder: Path, *, target: str, is_quiet: bool
) -> None:
    from dspark.eval.calibrate import keep_maps
    from dspark.eval.results import describe_model

    name = describe_model(target)["id"]
    path = keep_maps(folder, target_folder, run.entries, target_name=name)
    if not is_quiet:
        ui.print_note(console, f"kept in {path}")


@contextmanager
def _progress(
    console: Console, cells: Sequence[Cell], prompts: PromptSet, *, is_on: bool
) -> Iterator[Callable[[Cell], Callable[[float], None] | None]]:
    """A bar with the time left on a terminal; nothing elsewhere."""
    with ui.time_left_bar(console, is_on=is_on, counts="answers") as bar:
        if bar is None:
            yield lambda cell: None
            return
        task = bar.add_task("", total=len(cells) * prompts.num_turns)

        def report(cell: Cell) -> Callable[[float], None]:
            before = cells.index(cell) * prompts.num_turns
            name = cell.key.name
            return lambda done: bar.update(task, description=name, completed=before + done)

        yield report


def _show(results: dict[str, Any], *, as_json: bool) -> None:
    from dspark.commands.calibrate_table import calibrate_tables
    from dspark.commands.tables import print_tables

    if as_json:
        print(json.dumps(results, ensure_ascii=False, allow_nan=False))
    else:
        print_tables(calibrate_tables(results["maps"]))


def _finish(console: Console, run: _Run, *, is_quiet: bool) -> None:
    """Say where calibration falls short; exit 2 if a question failed."""
    for entry in run.entries if not is_quiet else ():
        for position in entry["positions"]:
            found, floor = position["ece"]["fitted"], position["floor"]
            if found > max(_GOAL, 1.5 * floor):
                ui.print_note(
                    console,
                    f"{entry['rule']} T={entry['temperature']:g} {entry['shape']}, position "
                    f"{position['position']}: ECE {100 * found:.1f} % on held-out prompts "
                    f"({100 * floor:.1f} % would be chance)",
                )
    for failure in run.failed:
        ui.print_error(console, f"question {failure['question_id']}: {failure['error']}")
    if run.failed:
        raise typer.Exit(2)
