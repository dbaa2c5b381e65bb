"""What `dspark bench` says besides its tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from dspark.commands import console as ui

if TYPE_CHECKING:
    from rich.console import Console

    from dspark.eval.bench import Bench
    from dspark.eval.bench_log import BenchLog

__all__ = ["finish", "introduce", "print_notes"]

_MOST_FAILURES = 20
"""Failed requests that are named one by one; the result file has all."""


def introduce(console: Console, header: Mapping[str, Any], bench: Bench) -> None:
    """Say what will be measured, on what."""
    target, sampling, prompts = header["target"], header["sampling"][0], header["prompts"][0]
    exact = "on" if header["exact"]["enabled"] else "off"
    threads = _count(header["threads"], "thread")
    dtype = ui.precision(target["dtype"], target.get("quant", "none"))
    ui.print_note(
        console,
        f"{target['id']}, {dtype}, {header['device']}, {threads}, exact mode {exact}",
    )
    length = "up to" if not sampling["ignore_eos"] else "end tokens ignored:"
    temperature = sampling["temperature"]
    law = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    number, repeats = _count(prompts["count"], "prompt"), _count(header["repeats"], "repeat")
    ui.print_note(
        console,
        f"{number} of {prompts['name']}, {length} {sampling['max_tokens']} tokens each, {law}; "
        f"{repeats}",
    )
    for item in bench.skipped:
        ui.print_note(
            console,
            f"{item.configuration} is left out at concurrency {item.concurrency}: {item.reason}",
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def print_notes(console: Console, results: Mapping[str, Any], bench: Bench, log: BenchLog) -> None:
    """Say what a reader of the tables must know."""
    for item in bench.dropped:
        ui.print_note(
            console, f"{item.configuration}, concurrency {item.concurrency}: {item.reason}"
        )
    for configuration in results["configurations"]:
        if configuration["note"]:
            ui.print_note(console, f"{configuration['name']}: {configuration['note']}")
    for cell in results["figures"]:
        if cell["ended_early"]:
            ui.print_note(
                console,
                f"{cell['configuration']}, concurrency {cell['concurrency']}: "
                f"{cell['ended_early']} answers are shorter than they should be",
            )
    if results["resumed"]:
        total = len(results["runs"])
        ui.print_note(console, f"{results['resumed']} of {total} runs were taken from {log.path}")


def finish(console: Console, results: Mapping[str, Any], log: BenchLog, *, is_kept: bool) -> None:
    """Name what failed and exit 2, or clean up."""
    failed = [
        f"{cell['configuration']}, concurrency {cell['concurrency']}, "
        f"repeat {failure['repeat'] + 1}, question {failure['question_id']}: {failure['error']}"
        for cell in results["figures"]
        for failure in cell["failed"]
    ]
    for line in failed[:_MOST_FAILURES]:
        ui.print_error(console, line)
    if len(failed) > _MOST_FAILURES:
        ui.print_error(console, f"{len(failed) - _MOST_FAILURES} more requests failed.")
    if failed:
        raise typer.Exit(2)
    if not is_kept:
        log.path.unlink(missing_ok=True)
