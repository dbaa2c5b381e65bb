"""The loop: steps, validations, checkpoints, and an exact resume.

What a step does depends on the seed, its number and the weights alone, so a run that was killed and
resumed from a checkpoint goes through the same losses, to the bit at the same number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dspark.errors import DataError
from dspark.training.checkpoints import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from dspark.training.engine import StepEngine
from dspark.training.metrics import Figures, figures_of
from dspark.training.optimizing import learning_rate
from dspark.training.plan import Plan
from dspark.training.progress import Reporter, RunLog, StepReport, ValidationReport
from dspark.training.publish import publish
from dspark.training.resume import check_resume
from dspark.training.samples import anchors_of
from dspark.training.setup import Setup
from dspark.training.world import ALONE, World

__all__ = ["Outcome", "Trainer"]

_MOST_SKIPPED = 10


@dataclass(slots=True, kw_only=True)
class _Counters:
    """What a checkpoint keeps besides tensors."""

    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    best_score: float | None = None
    best_step: int | None = None
    positions: int = 0
    seconds: float = 0.0
    figures: dict[str, Any] | None = field(default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a call of `Trainer.run` ended.

    Attributes:
        step: Steps done in all.
        total: Steps of the run.
        reason: "done", or what `should_stop` said.
        figures: Of the last validation, None without one.
        best_step: Step of the best validation, None without one.
        skipped: Steps skipped in all because something was not finite.
        seconds: Time spent in steps, over all calls.
    """

    step: int
    total: int
    reason: str
    figures: dict[str, Any] | None
    best_step: int | None
    skipped: int
    seconds: float

    @property
    def is_done(self) -> bool:
        """The run is complete."""
        return self.step >= self.total


class Trainer:
    """Trains a draft.

    Args:
        setup: What it works with.
        out: The run's folder: checkpoints/, log.jsonl, last/ and best/ (the draft).
        reporter: Who watches.
        world: The processes that share the work; the first one writes and reports.

    Raises:
        ConfigError: If the checkpoint belongs to another recipe.
        CheckpointError: If it cannot be read.
    """

    def __init__(
        self, setup: Setup, out: Path, *, reporter: Reporter, world: World = ALONE
    ) -> None:
        self._setup = setup
        self._recipe = setup.recipe
        self._out = out
        self._reporter = reporter
        self._world = world
        self._engine = StepEngine(setup, world)
        self._plan = Plan(setup.samples.train, self._recipe.run)
        self._counters = _Counters()
        self._saved = -1
        out.mkdir(parents=True, exist_ok=True)
        folder = latest_checkpoint(out)
        if folder is not None:
            self._restore(folder)
        self._log = RunLog(out / "log.jsonl", self._counters.step) if world.is_first else None

    @property
    def step(self) -> int:
        """Steps done."""
        return self._counters.step

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self._plan.total

    def run(self, should_stop: Callable[[], str | None] = lambda: None) -> Outcome:
        """Train until the run is done or somebody says stop; a checkpoint is there at the end.

        Args:
            should_stop: Asked after every step; a reason, or None to go on.

        Raises:
            DataError: If loss or gradient was not finite ten steps in a row.
        """
        counters, run = self._counters, self._recipe.run
        reason = "done"
        try:
            while counters.step < self._plan.total:
                self._one_step()
                step, is_last = counters.step, counters.step == self._plan.total
                if is_last or (run.validate_every and step % run.validate_every == 0):
                    self._validate()
                if is_last or step % run.checkpoint_every == 0:
                    self._save()
                stopped = self._world.agree(should_stop())
                if stopped is not None and not is_last:
                    reason = stopped
                    break
            self._save()
        finally:
            if self._log is not None:
                self._log.close()
        return Outcome(
            step=counters.step,
            total=self._plan.total,
            reason=reason,
            figures=counters.figures,
            best_step=counters.best_step,
            skipped=counters.skipped,
            seconds=counters.seconds,
        )

    # -- a step -------------------------------------------------------------------------------

    def _one_step(self) -> None:
        counters, recipe = self._counters, self._recipe
        began = time.perf_counter()
        epoch, inside = self._plan.locate(counters.step)
        samples = self._plan.steps_of(epoch)[inside]
        anchored = [(sample, anchors_of(sample, recipe.run, epoch)) for sample in samples]
        rate = learning_rate(recipe.schedule, recipe.optimizer.lr, counters.step, self._plan.total)
        result = self._engine.step(anchored, rate)
        counters.step += 1
        counters.seconds += time.perf_counter() - began
        counters.skipped += result.is_skipped
        counters.skipped_in_row = counters.skipped_in_row + 1 if result.is_skipped else 0
        figures = figures_of(result.sums, self._engine.terms)
        counters.positions += figures.positions
        report = StepReport(
            step=counters.step,
            total=self._plan.total,
            epoch=epoch,
            figures=figures,
            rate=rate,
            gradient=result.gradient,
            is_skipped=result.is_skipped,
            tokens=sum(sample.length for sample in samples),
            responses=sum(sample.length - sample.start for sample in samples),
            seconds=time.perf_counter() - began,
            target_seconds=result.target_seconds,
        )
        if self._log is not None:
            self._log.step(report)
            self._reporter.step(report)
        if counters.skipped_in_row >= _MOST_SKIPPED:
            raise DataError(
                f"loss or gradient was not finite in {_MOST_SKIPPED} steps in a row, up to step "
                f"{counters.step}.",
                hint="lower optimizer.lr, and go on from the last checkpoint",
            )

    # -- validation and output ----------------------------------------------------------------

    def _validate(self) -> None:
        held_out = self._setup.samples.validation[: self._recipe.data.validation_sequences]
        if not held_out:
            return
        began = time.perf_counter()
        counters = self._counters
        anchored = [(sample, anchors_of(sample, self._recipe.run, None)) for sample in held_out]
        figures = figures_of(self._engine.evaluate(anchored), self._engine.terms)
        score = (figures.tau_greedy + figures.tau_sampling) / 2
        is_best = counters.best_score is None or score > counters.best_score
        counters.figures = asdict(figures)
        if is_best:
            counters.best_score, counters.best_step = score, counters.step
            self._publish("best", figures)
        self._publish("last", figures)
        report = ValidationReport(
            step=counters.step,
            figures=figures,
            is_best=is_best,
            seconds=time.perf_counter() - began,
        )
        if self._log is not None:
            self._log.validation(report)
            self._reporter.validation(report)

    def _publish(self, name: str, figures: Figures | None) -> None:
        weights = self._engine.weights()
        if not self._world.is_first:
            return
        publish(
            self._out / name,
            self._setup,
            weights,
            step=self._counters.step,
            epoch=self._plan.epochs_at(self._counters.step),
            figures=figures,
        )

    # -- checkpoints --------------------------------------------------------------------------

    def _save(self) -> None:
        counters = self._counters
        if self._saved == counters.step:
            return
        self._setup.source.flush()  # what a resumed run reads must be what this one goes on with
        state = {
            "version": 1,
            "counters": asdict(counters),
            "recipe": self._recipe.to_json(),
            "target": self._setup.described,
            "data_sha256": self._setup.samples.sha256,
            "threads": torch.get_num_threads(),
        }
        checkpoint = Checkpoint(self._engine.weights(), self._engine.optimizer_state(), state)
        if self._world.is_first:
            save_checkpoint(self._out, counters.step, checkpoint, keep=self._recipe.run.keep)
        self._saved = counters.step
        if counters.figures is None:
            self._publish("last", None)
        self._world.wait()

    def _restore(self, folder: Path) -> None:
        checkpoint = load_checkpoint(folder)
        setup = self._setup
        notes = check_resume(checkpoint.state, setup, folder)
        self._engine.load(checkpoint.weights, checkpoint.optimizer, folder)
        self._counters = _Counters(**checkpoint.state["counters"])
        self._saved = self._counters.step
        for note in notes if self._world.is_first else ():
            self._reporter.note(note)
        if self._world.is_first:
            self._reporter.note(f"going on from step {self._counters.step} ({folder.name})")
