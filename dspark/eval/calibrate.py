"""Calibrating survival: run a draft over prompts, fit its survival maps, judge them, keep them.

Questions are parted into folds, in turn within each category. The map that is kept is fitted on all
of them; each fold is judged by a map fitted on the others (cross-fitting), so that every question
judges and none judges a map that saw it. What is observed must not be selected by what would be
fitted: chains have their whole length, trees a fixed budget, and auto-off and trimming are off
(`eval_engine`), as are maps fitted before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dspark
from dspark.draft.calibration import CalibrationKey, SurvivalMap
from dspark.draft.calibration_file import (
    FILE_NAME,
    SCHEMA,
    VERSION,
    fingerprint,
    key_of,
    read_calibration,
    read_maps,
)
from dspark.draft.grow import GrowsTrees, GrowthConfig
from dspark.engine import Engine
from dspark.errors import CapabilityError, ConfigError, DataError
from dspark.eval.calibrate_fit import fit_map, fit_temperatures
from dspark.eval.calibrate_quality import Judged, by_position, by_rank
from dspark.eval.calibrate_record import Observations, OfferRecorder
from dspark.eval.prompts import PromptSet, Question
from dspark.eval.results import write_results
from dspark.eval.runner import Runner, eval_engine, explicit_params
from dspark.request import Rule, SamplingParams
from dspark.tree import FloatArray

__all__ = [
    "FOLDS",
    "Cell",
    "Measured",
    "calibrate",
    "cells_of",
    "folds",
    "imported",
    "keep_maps",
    "measure",
]

FOLDS = 4
_TEMPERATURE_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One kind of request that gets a map of its own.

    Attributes:
        key: Rule in force, temperature, chain or tree.
        params: Sampling parameters to observe it with.
    """

    key: CalibrationKey
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was observed of a cell.

    Attributes:
        folds: Of each fold's questions, two or more.
        failed: Questions that failed: id and error.
    """

    folds: tuple[Observations, ...]
    failed: tuple[dict[str, Any], ...]


def cells_of(
    base: SamplingParams,
    rules: Sequence[str],
    temperatures: Sequence[float],
    shapes: Sequence[str],
) -> list[Cell]:
    """Every rule at every temperature in every shape, each once.

    At temperature 0 all rules are greedy, and block verifies chains only.

    Args:
        base: Everything else; its width is a tree's.
        rules: Values of `Rule`, or "auto".
        temperatures: >= 0.
        shapes: "chain", "tree".

    Raises:
        ConfigError: If a shape is unknown, nothing is left, or rule and temperature do not go
            together.
    """
    found: dict[CalibrationKey, Cell] = {}
    for shape in shapes:
        if shape not in ("chain", "tree"):
            raise ConfigError(f"shape is {shape!r}, but must be chain or tree.")
        for rule in rules:
            for temperature in temperatures:
                params = replace(base, rule=rule, temperature=temperature)
                if shape == "chain":
                    params = replace(params, width=1, tree_budget=None)
                in_force = params.resolved_rule
                key = CalibrationKey(
                    rule=in_force, temperature=float(temperature), is_chain=shape == "chain"
                )
                if in_force is not Rule.BLOCK or key.is_chain:
                    found.setdefault(key, Cell(key=key, params=params))
    if not found:
        raise ConfigError("rule block verifies chains only, so it has no trees to calibrate.")
    if base.width == 1 and not all(key.is_chain for key in found):
        raise ConfigError("width is 1, which is a chain, but trees were asked for.")
    return list(found.values())


def folds(prompts: PromptSet, count: int = FOLDS) -> list[PromptSet]:
    """The questions in folds of like size, each category dealt out to them in turn.

    Args:
        prompts: The questions.
        count: Folds, >= 2; with fewer questions than that, one question each.

    Raises:
        DataError: If there are fewer than two questions.
    """
    if len(prompts.questions) < 2:
        raise DataError(f"{prompts.name} has one question, but calibrating needs two or more.")
    by_category: dict[str, list[Question]] = {}
    for question in prompts.questions:
        by_category.setdefault(question.category, []).append(question)
    order = [question for group in by_category.values() for question in group]
    count = min(count, len(order))
    return [replace(prompts, questions=tuple(order[first::count])) for first in range(count)]


@contextmanager
def _recording(drafter: GrowsTrees, recorder: OfferRecorder, *, is_chain: bool) -> Iterator[None]:
    """Have a drafter tell of what it offers, without a map and, of chains, to the end."""
    before: GrowthConfig = drafter.config
    least = 0.0 if is_chain else before.min_survival
    drafter.config = replace(before, calibration=None, recorder=recorder, min_survival=least)
    try:
        yield
    finally:
        drafter.config = before


def measure(
    engine: Engine,
    cell: Cell,
    prompts: PromptSet,
    *,
    num_folds: int = FOLDS,
    seed: int = 0,
    batch: int = 1,
    is_raw: bool = False,
    on_progress: Callable[[float], None] | None = None,
) -> Measured:
    """Answer all questions in one cell and observe what becomes of what is drafted.

    Args:
        engine: The target and the draft.
        cell: The rule, temperature and shape.
        prompts: Two questions or more.
        num_folds: See `folds`.
        seed: Every question's is derived from it.
        batch: Questions at a time.
        is_raw: No chat template.
        on_progress: Called with the turns done so far, shares of answers included.

    Returns:
        What was observed.

    Raises:
        CapabilityError: If the draft has no survival that a map could replace.
        DataError: If too little was drafted, or there are fewer than two questions.
    """
    drafter = engine.drafter
    if not isinstance(drafter, GrowsTrees) or not isinstance(drafter.config, GrowthConfig):
        raise CapabilityError(
            f"draft {drafter.name} cannot be calibrated: its survival does not come from a "
            "network's laws.",
            hint="name one draft module or model; lookup needs none",
        )
    own = eval_engine(engine, batch=batch)
    params = explicit_params(cell.params, own)
    if cell.key.is_chain:
        params = replace(params, tree_budget=params.depth)
    runner = Runner(own, params, seed=seed, is_raw=is_raw)
    seen, failed, done = [], [], 0.0
    for fold in folds(prompts, num_folds):
        recorder = OfferRecorder()
        before = done

        def report(turns: float, before: float = before) -> None:
            if on_progress is not None:
                on_progress(before + turns)

        with _recording(drafter, recorder, is_chain=cell.key.is_chain):
            records = runner.run(fold.questions, on_progress=report)
        failed += [
            {"question_id": record.question_id, "error": record.error}
            for record in records
            if record.error is not None
        ]
        done += fold.num_turns
        seen.append(recorder.observations())
    if sum(any(family.is_reached for family in part.families) for part in seen) < 2:
        raise DataError(
            f"{cell.key.name}: too little was drafted whose outcome is known.",
            hint="give more or longer answers: --limit, --max-tokens",
        )
    return Measured(folds=tuple(seen), failed=tuple(failed))


def calibrate(key: CalibrationKey, measured: Measured, *, dataset: str) -> dict[str, Any]:
    """Fit a cell's map and judge it.

    Args:
        key: The cell's.
        measured: What was observed of it.
        dataset: Name of the prompt set.

    Returns:
        An entry of the calibration file: rule, temperature, shape, map, sts, and how it was made
        (docs/calibrate.md).
    """
    whole = Observations.joined(measured.folds)
    rating, scaling = _fitted(key, whole)
    judged = []
    for place, fold in enumerate(measured.folds):
        others = Observations.joined(measured.folds[:place] + measured.folds[place + 1 :])
        judged.append(Judged(fold, *_fitted(key, others)))
    positions = by_position(judged)
    is_drawn = key.rule.draws_from_laws
    return {
        **_named(key),
        "map": rating.to_json(),
        "sts": None if scaling is None else _sts(scaling, positions, whole, dataset),
        "prompts": dataset,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dspark": dspark.__version__,
        "rounds": {"count": whole.rounds, "folds": len(measured.folds)},
        "positions": positions,
        "ranks": [] if key.is_chain else by_rank(judged, is_drawn=is_drawn),
    }


def _fitted(key: CalibrationKey, seen: Observations) -> tuple[SurvivalMap, FloatArray | None]:
    """A map, and for chains temperatures of the confidence head alone, if there is one."""
    rating = fit_map(seen, is_drawn=key.rule.draws_from_laws, is_chain=key.is_chain)
    if not (key.is_chain and seen.has_confidence):
        return rating, None
    return rating, fit_temperatures(seen.paths.confidence, seen.paths.accepted)


def imported(key: CalibrationKey, rating: SurvivalMap, sts: dict[str, Any]) -> dict[str, Any]:
    """An entry that was read from elsewhere, and judged by nobody here."""
    return {
        **_named(key),
        "map": rating.to_json(),
        "sts": sts,
        "prompts": sts["dataset"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dspark": dspark.__version__,
        "rounds": None,
        "positions": [],
        "ranks": [],
    }


def _named(key: CalibrationKey) -> dict[str, Any]:
    return {
        "rule": key.rule.value,
        "temperature": key.temperature,
        "shape": "chain" if key.is_chain else "tree",
    }


def _sts(
    scaling: FloatArray,
    positions: Sequence[dict[str, Any]],
    seen: Observations,
    dataset: str,
) -> dict[str, Any]:
    """Temperatures of the confidence head alone, as SGLang's file has them."""
    temperatures = [round(float(value), _TEMPERATURE_DIGITS) for value in scaling]
    return {
        "temperatures": temperatures,
        "dataset": dataset,
        "num_samples": seen.rounds,
        "ece_before": [entry["ece"]["confidence"] for entry in positions],
        "ece_after": [entry["ece"]["scaled"] for entry in positions],
    }


def keep_maps(
    folder: Path, target: Path, entries: Sequence[dict[str, Any]], *, target_name: str
) -> Path:
    """Write entries to the file beside a draft's weights.

    Entries of the same rule, temperature and shape are replaced, others stay if the file was made
    for these weights.

    Args:
        folder: The draft's.
        target: The target's.
        entries: From `calibrate`.
        target_name: What to call the target.

    Returns:
        The file.

    Raises:
        DataError: If it cannot be written, or the weights cannot be read.
    """
    try:
        draft = {"fingerprint": fingerprint(folder)}
        verifier = {"name": target_name, "fingerprint": fingerprint(target, has_config=False)}
    except OSError as exc:
        raise DataError(f"the weights in {folder} cannot be read: {exc.strerror}.") from exc
    path = folder / FILE_NAME
    kept = {key_of(entry): entry for entry in _kept_entries(path, draft, verifier)}
    kept.update({key_of(entry): entry for entry in entries})
    document = {
        "schema": SCHEMA,
        "version": VERSION,
        "draft": draft,
        "target": verifier,
        "maps": [kept[key] for key in sorted(kept)],
    }
    read_maps(document)  # what could not be read again is not written
    write_results(path, document)
    return path


def _kept_entries(
    path: Path, draft: dict[str, str], target: dict[str, str]
) -> list[dict[str, Any]]:
    """Entries of a file that was made for these weights; none of any other."""
    if not path.exists():
        return []
    try:
        found = read_calibration(path)
        read_maps(found)
    except DataError:
        return []
    stated = [found.get("draft"), found.get("target")]
    wanted = [draft["fingerprint"], target["fingerprint"]]
    known = [part.get("fingerprint") if isinstance(part, dict) else None for part in stated]
    return list(found["maps"]) if known == wanted else []
