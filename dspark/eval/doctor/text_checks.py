"""Checks of acceptance as a whole: against published figures, and with other chat templates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dspark.errors import CapabilityError, DataError
from dspark.eval.acceptance import bootstrap_tau
from dspark.eval.doctor.exam import Exam
from dspark.eval.doctor.findings import CheckResult, Finding, Severity
from dspark.eval.doctor.references import find_reference
from dspark.eval.doctor.replay import replay
from dspark.eval.doctor.traces import add_states, write_traces
from dspark.request import Prompt
from dspark.text import TextCodec

__all__ = ["Asked", "ask", "check_acceptance", "check_template"]

_NEVER = 1.15  # tau of a trained draft that as good as guesses
_FAR = 0.6  # of the lowest published tau: something is broken
_LOW = 0.8
_GAIN = 1.2  # of tau, before another template is called better
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A prompt to answer.

    Attributes:
        question_id: As in the prompt set.
        category: As in the prompt set.
        text: What the user says; None for a prompt of token ids.
        token_ids: The prompt where there is no text.
    """

    question_id: str | int
    category: str
    text: str | None = None
    token_ids: tuple[int, ...] = ()


def ask(
    asked: Sequence[Asked], codec: TextCodec | None, *, is_raw: bool
) -> list[tuple[str | int, str, Prompt]]:
    """Prompts as the target gets them.

    Args:
        asked: What to ask.
        codec: The target's text codec.
        is_raw: Leave the chat template out.
    """
    is_chat = codec is not None and codec.has_chat_template and not is_raw
    prompts: list[tuple[str | int, str, Prompt]] = []
    for own in asked:
        prompt: Prompt = own.token_ids
        if own.text is not None:
            prompt = [{"role": "user", "content": own.text}] if is_chat else own.text
        prompts.append((own.question_id, own.category, prompt))
    return prompts


def check_acceptance(exam: Exam) -> CheckResult:
    """Whether the draft is ever right, and how far below what it reached elsewhere."""
    name, patient = "acceptance", exam.patient
    if patient.trained is None or not exam.chain.places:
        return CheckResult.skipped(name, "nothing of this draft was trained for the target")
    tau = exam.chain.tau
    interval = bootstrap_tau(exam.chain.records(exam.traces))
    high = tau if interval is None else interval[1]
    around = "" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"
    seen = f"tau {tau:.2f}{around} as a chain, greedy"
    known = find_reference(patient)
    figures: dict[str, object] = {"tau": tau}
    what = None
    if known is not None:
        span = f"{known.lowest:.2f}"
        if len(known.tau) > 1:
            span += f" to {max(known.tau.values()):.2f}"
        seen += f"; {known.source} has {span} ({known.conditions})"
        figures |= {"reference": dict(known.tau), "source": known.source}
        if high < _LOW * known.lowest:
            far = "far " if high < _FAR * known.lowest else ""
            what = f"acceptance is {far}below what {known.name} reaches elsewhere"
    is_broken = high < _NEVER or (known is not None and high < _FAR * known.lowest)
    if high < _NEVER:
        what = "the draft is hardly ever right"
    if what is None:
        return CheckResult(name=name, seen=seen, figures=figures)
    found = Finding(
        severity=Severity.PROBLEM if is_broken else Severity.WARNING,
        what=what,
        evidence=seen,
        advice="see the other findings; else check that the target is the very one it was trained "
        "for (not a fine-tune, not quantised) and that thinking is as in training",
    )
    return CheckResult(name=name, findings=(found,), seen=seen, figures=figures)


def check_template(exam: Exam, asked: Sequence[Asked]) -> CheckResult:
    """Whether another chat template, none, or another thinking mode suits the draft better.

    Args:
        exam: The pair.
        asked: What was asked; the target answers it again in every other form.
    """
    name, codec = "template", exam.patient.codec
    if exam.patient.trained is None or not exam.chain.places:
        return CheckResult.skipped(name, "nothing of this draft was trained for the target")
    if codec is None or not codec.has_chat_template or any(own.text is None for own in asked):
        return CheckResult.skipped(name, "the target has no chat template")
    found = _recorded(exam, codec)
    figures: dict[str, object] = {"tau": exam.chain.tau}
    for label, other, is_raw in _forms(codec, is_raw=exam.config.is_raw):
        both = _in_form(exam, asked, other, is_raw=is_raw)
        if both is None:
            continue
        base, tau, low = both
        figures[label] = tau
        if tau > _GAIN * base and low > 1:
            found.append(
                Finding(
                    severity=Severity.WARNING,
                    what=f"the draft does better {label}",
                    evidence=f"tau {tau:.2f} against {base:.2f} on the same questions",
                    advice="the draft was trained on texts of that form; ask in that form, or "
                    "train it on yours",
                )
            )
    tried = ", ".join(f"{label} {v:.2f}" for label, v in figures.items() if isinstance(v, float))
    return CheckResult(name=name, findings=tuple(found), seen=tried, figures=figures)


def _recorded(exam: Exam, codec: TextCodec) -> list[Finding]:
    """The template's checksum against the one that the draft was trained with."""
    theirs = exam.patient.training.get("template_sha256")
    template = getattr(codec.tokenizer, "chat_template", None)
    if not isinstance(theirs, str) or not isinstance(template, str):
        return []
    ours = hashlib.sha256(template.encode()).hexdigest()
    if ours == theirs:
        return []
    return [
        Finding(
            severity=Severity.WARNING,
            what="the draft was trained with another chat template",
            evidence=f"its config.json has {theirs[:12]}, the target's template is {ours[:12]}",
            advice="use the tokenizer files that it was trained with, or train it again",
        )
    ]


def _forms(codec: TextCodec, *, is_raw: bool) -> Iterator[tuple[str, TextCodec, bool]]:
    """Other forms of the same questions: label, codec, whether the template is left out."""
    if is_raw:
        yield "with the chat template", codec, False
        return
    yield "without the chat template", codec, True
    for think, label in ((True, "thinking"), (False, "not thinking")):
        try:
            yield label, codec.with_reasoning(think, None), False
        except CapabilityError:
            continue


def _in_form(
    exam: Exam, asked: Sequence[Asked], codec: TextCodec, *, is_raw: bool
) -> tuple[float, float, float] | None:
    """Tau as it is, tau in another form, and the ratio's lower bound (95 %, paired bootstrap)."""
    trained = exam.patient.trained
    if trained is None:
        return None
    prompts = ask(asked, codec, is_raw=is_raw)
    try:
        traces = write_traces(
            exam.patient.target, codec, prompts, max_tokens=exam.config.max_tokens
        )
    except DataError:
        return None
    traces = add_states(exam.patient.target, traces, trained.capture)
    run = replay(trained, traces, exam.config.chain, clock=exam.clock)
    here = dict(
        zip(
            (trace.question_id for trace in exam.traces),
            exam.chain.by_trace(len(exam.traces)),
            strict=True,
        )
    )
    there = dict(
        zip((trace.question_id for trace in traces), run.by_trace(len(traces)), strict=True)
    )
    shared = [question for question in here if question in there]
    if len(shared) < 2:
        return None
    pairs = np.array([(here[question], there[question]) for question in shared])
    picks = np.random.default_rng(0).integers(0, len(pairs), size=(_RESAMPLES, len(pairs)))
    sums = pairs[picks].sum(axis=1)
    low = float(np.quantile(sums[:, 1] / sums[:, 0], 0.025))
    base, tau = pairs.mean(axis=0)
    return float(base), float(tau), low
