"""A visit to the doctor: all checks of a pair, in order; Ctrl-C keeps what there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark.errors import ConfigError, DataError
from dspark.eval.acceptance import acceptance
from dspark.eval.doctor.draft_checks import (
    check_dtype,
    check_loading,
    check_proposals,
    check_vocabulary,
    check_weights,
    check_window,
)
from dspark.eval.doctor.exam import DoctorConfig, Exam
from dspark.eval.doctor.findings import CheckResult, DoctorReport, Finding, Severity
from dspark.eval.doctor.machine_checks import check_exact, check_memory, check_threads
from dspark.eval.doctor.patient import Patient
from dspark.eval.doctor.replay import Replay, replay
from dspark.eval.doctor.speed_check import check_speed
from dspark.eval.doctor.text_checks import Asked, ask, check_acceptance, check_template
from dspark.eval.doctor.traces import add_states, write_traces
from dspark.eval.doctor.variant_checks import (
    SHIFTS,
    check_block,
    check_layers,
    check_mask,
    shifted_layers,
)

__all__ = ["Progress", "diagnose"]

Progress = Callable[[str, float, float], None]
"""Called with what runs now, the part of the work that is done, and seconds left (0: unknown)."""

_WEIGHTS = {
    "threads": 1.0,
    "answers": 5.0,
    "rounds": 3.0,
    "layer ids": 2.0,
    "mask token": 3.0,
    "block": 3.0,
    "dtype": 1.0,
    "template": 8.0,
    "speed": 8.0,
}


@dataclass(slots=True)
class _Watch:
    """What runs, and how long it will take."""

    on_progress: Progress | None
    clock: Callable[[], float]
    start: float = 0.0
    done: float = 0.0
    now: str = ""

    def begin(self, name: str) -> None:
        self.done += _WEIGHTS.get(self.now, 0.0)
        self.now = name
        self.show(name, 0.0)

    def show(self, what: str, share: float) -> None:
        if self.on_progress is None:
            return
        part = (self.done + share * _WEIGHTS.get(self.now, 0.0)) / sum(_WEIGHTS.values())
        spent = self.clock() - self.start
        self.on_progress(what, part, spent * (1 - part) / part if part > 0 else 0.0)


def diagnose(
    patient: Patient,
    asked: Sequence[Asked],
    config: DoctorConfig | None = None,
    *,
    header: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> DoctorReport:
    """Check a pair and the machine.

    Args:
        patient: The pair; nothing else should use it meanwhile.
        asked: Prompts; six are enough, of several kinds.
        config: How much to look at.
        header: Of the report.
        on_progress: Called as it goes.
        clock: Seconds of now, for everything that is timed but the measured run.

    Returns:
        The report. After Ctrl-C it holds what there was, and says so.

    Raises:
        ConfigError: If there is no prompt.
    """
    if not asked:
        raise ConfigError("there is no prompt to look at the pair with.")
    exam = Exam(patient=patient, config=DoctorConfig() if config is None else config, clock=clock)
    report = DoctorReport(header=dict(header or {}))
    watch = _Watch(on_progress, clock, start=clock())
    try:
        for check in _checks(exam, asked, report, watch):
            report.checks.append(check)
    except KeyboardInterrupt:
        report.is_interrupted = True
    report.seconds = clock() - watch.start
    return report


def _checks(
    exam: Exam, asked: Sequence[Asked], report: DoctorReport, watch: _Watch
) -> Iterator[CheckResult]:
    patient = exam.patient
    yield check_loading(patient)
    yield check_exact(patient.target)
    watch.begin("threads")
    yield check_threads(exam, clock=exam.clock)
    yield check_memory(exam)
    if patient.drafter is None:
        return
    yield check_weights(patient)
    watch.begin("answers")
    try:
        _observe(exam, asked, watch)
    except DataError as exc:
        yield _target_fails(exc)
        return
    report.acceptance = {
        kind: acceptance(run.records(exam.traces))
        for kind, run in (("tree", exam.tree), ("chain", exam.chain))
        if run.places
    }
    yield check_proposals(exam)
    if exam.tree.error is None:
        yield from _draft_checks(exam, asked, watch)
    watch.begin("speed")
    speed = check_speed(exam, on_step=lambda what: watch.show(what, 0.3))
    report.cost = speed.table
    yield speed.check


def _draft_checks(exam: Exam, asked: Sequence[Asked], watch: _Watch) -> Iterator[CheckResult]:
    yield check_vocabulary(exam)
    watch.begin("layer ids")
    yield check_layers(exam)
    watch.begin("mask token")
    yield check_mask(exam)
    watch.begin("block")
    yield check_block(exam)
    watch.begin("dtype")
    yield check_dtype(exam)
    yield check_window(exam)
    watch.begin("template")
    if exam.config.is_quick:
        yield CheckResult.skipped("template", "left out in a quick visit")
    else:
        yield check_template(exam, asked)
    yield check_acceptance(exam)


def _target_fails(exc: DataError) -> CheckResult:
    found = Finding(
        severity=Severity.PROBLEM,
        what="the target does not answer",
        evidence=exc.message,
        advice="try dspark generate with --draft none; look at its dtype and its weights",
    )
    return CheckResult(name="target", findings=(found,))


def _observe(exam: Exam, asked: Sequence[Asked], watch: _Watch) -> None:
    """Have the target answer, and the draft go along."""
    patient, config = exam.patient, exam.config
    prompts = ask(asked, patient.codec, is_raw=config.is_raw)
    traces = write_traces(
        patient.target,
        patient.codec,
        prompts,
        max_tokens=config.max_tokens,
        on_done=lambda count: watch.show("answers", count / len(prompts)),
    )
    watch.begin("rounds")
    exam.traces = add_states(patient.target, traces, _layers(patient))
    exam.tree = _replayed(exam, is_tree=True)
    if patient.trained is None or exam.tree.error is not None:
        return
    exam.chain = _replayed(exam, is_tree=False)
    exam.strides = replay(patient.trained, exam.traces, config.strides, clock=exam.clock)


def _replayed(exam: Exam, *, is_tree: bool) -> Replay:
    config = exam.config
    drafter = exam.patient.drafter if is_tree else exam.patient.trained
    if drafter is None:
        return Replay()
    shape = config.tree if is_tree else config.chain
    return replay(drafter, exam.traces, shape, clock=exam.clock)


def _layers(patient: Patient) -> list[int]:
    """Layers that the draft reads, and their neighbours where these exist."""
    drafter = patient.drafter
    own = set() if drafter is None else set(drafter.capture)
    wanted = set(own)
    trained = patient.trained
    for shift in SHIFTS if trained is not None else ():
        moved = shifted_layers(own, shift, patient.target.info.num_layers)
        wanted |= set() if moved is None else set(moved.values())
    return sorted(wanted)
