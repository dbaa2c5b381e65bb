"""Checks of the draft by itself: weights, whether it proposes, vocabulary, dtype, window."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dspark.draft.dspark_module import DSparkModule
from dspark.eval.doctor.exam import Exam
from dspark.eval.doctor.findings import CheckResult, Finding, Severity
from dspark.eval.doctor.machine import free_memory
from dspark.eval.doctor.patient import Patient
from dspark.eval.doctor.replay import Replay, compare, replay

__all__ = [
    "check_dtype",
    "check_loading",
    "check_proposals",
    "check_vocabulary",
    "check_weights",
    "check_window",
]

_MODEST_COVERAGE = 0.97
_POOR_COVERAGE = 0.90
_RARE = 0.05
_FALL = 0.75  # of tau, from short contexts to long ones


def check_loading(patient: Patient) -> CheckResult:
    """Whether the draft can be loaded, and was made for this target."""
    name = "loading"
    refusal = patient.refusal
    if refusal is not None:
        found = Finding(
            severity=Severity.PROBLEM,
            what="the draft cannot be loaded for this target",
            evidence=refusal.message,
            advice=refusal.hint or "correct its config.json, or use another draft",
        )
        return CheckResult(name=name, findings=(found,))
    if patient.drafter is None:
        return CheckResult.skipped(name, "there is no draft")
    theirs = patient.trained_for.get("fingerprint")
    if theirs is None:
        return CheckResult(name=name, seen="it loads")
    from dspark.eval.results import describe_model

    ours = describe_model(patient.target.info.name)
    if ours["fingerprint"] in (None, theirs):
        return CheckResult(name=name, seen="it loads, and was trained for these weights")
    found = Finding(
        severity=Severity.WARNING,
        what="the draft was trained for other weights than the target's",
        evidence=f"it names {patient.trained_for.get('id')} with fingerprint {str(theirs)[:12]}, "
        f"and this is {ours['id']} with {str(ours['fingerprint'])[:12]}",
        advice="use the target it was trained for, or train it on this one",
    )
    return CheckResult(name=name, findings=(found,))


def check_weights(patient: Patient) -> CheckResult:
    """Whether every weight is finite."""
    name, bad, count = "weights", list[str](), 0
    if patient.trained is None:
        return CheckResult.skipped(name, "nothing of this draft was trained for the target")
    for tensor_name, tensor in patient.weights():
        count += 1
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad.append(tensor_name)
    if not count:
        return CheckResult.skipped(name, "the draft is part of the target's own files")
    if not bad:
        return CheckResult(name=name, seen=f"{count} tensors, all finite")
    shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    found = Finding(
        severity=Severity.PROBLEM,
        what="the draft has weights that are not finite",
        evidence=f"NaN or infinity in {len(bad)} of {count} tensors: {shown}",
        advice="load it in another --dtype (float16 overflows easily), or fetch it again",
    )
    return CheckResult(name=name, findings=(found,), figures={"tensors": bad})


def check_proposals(exam: Exam) -> CheckResult:
    """Whether the drafter proposes at all."""
    name, rounds, run = "proposals", len(exam.tree.places), exam.tree
    figures = {"rounds": rounds, "drafted": run.drafted, "warnings": list(run.warnings)}
    found: list[Finding] = []
    said = f"; it said: {run.warnings[0]}" if run.warnings else ""
    is_lookup = exam.patient.trained is None
    if run.error is not None:
        found.append(
            Finding(
                severity=Severity.PROBLEM,
                what="the drafter fails, so decoding goes on without it",
                evidence=f"after {rounds} rounds: {run.error}",
                advice="report it to whoever made the drafter; until then use --draft lookup",
            )
        )
    elif not rounds:
        return CheckResult.skipped(name, "the answers were too short for a round")
    elif run.drafted < (_RARE if is_lookup else 0.5):
        found.append(_seldom(exam, said, is_lookup=is_lookup))
    elif run.warnings:
        found.append(
            Finding(
                severity=Severity.WARNING,
                what="the drafter complains",
                evidence=run.warnings[0],
                advice="see the other findings; its proposals are empty where this happens",
            )
        )
    seen = f"a proposal in {_percent(run.drafted)} of {rounds} rounds"
    return CheckResult(name=name, findings=tuple(found), seen=seen, figures=figures)


def _seldom(exam: Exam, said: str, *, is_lookup: bool) -> Finding:
    run, rounds = exam.tree, len(exam.tree.places)
    often = "never proposes" if run.drafted == 0 else "seldom proposes"
    evidence = f"a proposal in {_percent(run.drafted)} of {rounds} rounds{said}"
    if not is_lookup or said:
        return Finding(
            severity=Severity.PROBLEM,
            what=f"the draft {often}",
            evidence=evidence,
            advice="see what it said, the weights and the dtype; a trained draft proposes always",
        )
    return Finding(
        severity=Severity.WARNING,
        what=f"the draft {often} on these prompts",
        evidence=f"{evidence}: the answers do not repeat the prompt or themselves",
        advice="lookup helps with editing, quoting and long answers; else use a trained draft",
    )


def check_vocabulary(exam: Exam) -> CheckResult:
    """What share of the target's own tokens the draft cannot say."""
    name = "vocabulary"
    if exam.patient.trained is None:
        return CheckResult.skipped(name, "nothing of this draft was trained for the target")
    ids = exam.patient.vocabulary()
    if ids is None:
        return CheckResult(name=name, seen="the draft has the target's whole vocabulary")
    said = np.concatenate([np.array(trace.answer) for trace in exam.traces])
    known = np.isin(said, ids.numpy())
    coverage = float(known.mean())
    size = exam.patient.target.info.vocab_size
    figures = {"draft_vocab_size": len(ids), "vocab_size": size, "coverage": coverage}
    seen = f"{len(ids)} of {size} tokens, {_percent(coverage)} of what the target says"
    found = []
    if bool((ids[1:] <= ids[:-1]).any()):
        found.append(
            Finding(
                severity=Severity.WARNING,
                what="the draft's vocabulary map does not rise",
                evidence=f"{int((ids[1:] <= ids[:-1]).sum())} of {len(ids)} ids are not above the "
                "one before",
                advice="d2t must hold offsets (target id - draft id); check how it was converted",
            )
        )
    if coverage < _MODEST_COVERAGE:
        missing = said[~known]
        most = [int(token) for token in np.unique(missing)[:8]]
        is_poor = coverage < _POOR_COVERAGE
        found.append(
            Finding(
                severity=Severity.PROBLEM if is_poor else Severity.WARNING,
                what="the draft's vocabulary lacks tokens that the target says",
                evidence=f"{_percent(1 - coverage)} of {len(said)} tokens of the answers are "
                f"missing (ids {', '.join(map(str, most))}, ...); a chain ends there at the latest",
                advice="check d2t and t2d (offsets, not ids); else use a draft with a vocabulary "
                "made from texts like yours",
            )
        )
    return CheckResult(name=name, findings=tuple(found), seen=seen, figures=figures)


def check_dtype(exam: Exam) -> CheckResult:
    """Whether the dtype in use costs acceptance."""
    name, patient, info = "dtype", exam.patient, exam.patient.target.info
    if patient.trained is None or not exam.traces:
        return CheckResult.skipped(name, "nothing of this draft was trained for the target")
    made_in = _training_dtype(patient)
    figures: dict[str, object] = {"dtype": info.dtype, "trained": made_in}
    found = []
    other = torch.bfloat16 if info.dtype == "float32" else torch.float32
    label = str(other).removeprefix("torch.")
    module = patient.module
    need = 0 if module is None else sum(p.numel() for p in module.parameters()) * other.itemsize
    room = free_memory()
    if module is not None and (room is None or need < room / 2):
        run = replay(patient.in_dtype(other), exam.traces, exam.config.strides, clock=exam.clock)
        both = compare(exam.strides, run)
        figures[f"tokens_in_{label}"] = both.other
        figures["tokens"] = both.base
        if both.is_clear:
            found.append(
                Finding(
                    severity=Severity.WARNING,
                    what=f"the draft does better in {label} than in {info.dtype}",
                    evidence=f"{both.other:.2f} tokens a round against {both.base:.2f}",
                    advice=f"use --dtype {label} if the machine can afford it",
                )
            )
    if made_in is not None and made_in != info.dtype and patient.trained.capture:
        rounded = getattr(torch, made_in)

        def transform(rows: Tensor) -> Tensor:
            return rows.to(rounded).to(rows.dtype)

        run = replay(
            patient.trained,
            exam.traces,
            exam.config.strides,
            transform=transform,
            clock=exam.clock,
        )
        both = compare(exam.strides, run)
        figures[f"tokens_with_{made_in}_states"] = both.other
        if both.is_clear:
            found.append(
                Finding(
                    severity=Severity.WARNING,
                    what=f"the draft expects hidden states of {made_in}, as it was trained on",
                    evidence=f"{both.other:.2f} tokens a round with states rounded to {made_in}, "
                    f"{both.base:.2f} as they are",
                    advice=f"load the target in --dtype {made_in}",
                )
            )
    seen = f"{info.dtype}" + (f", trained in {made_in}" if made_in else "")
    return CheckResult(name=name, findings=tuple(found), seen=seen, figures=figures)


def _training_dtype(patient: Patient) -> str | None:
    """The target's dtype that the draft was trained with, as far as its config says."""
    for holder, name in (
        (patient.trained_for, "dtype"),
        (patient.config, "dtype"),
        (patient.config, "torch_dtype"),
    ):
        value = holder.get(name)
        if value in ("float32", "bfloat16", "float16"):
            return str(value)
    return None


def check_window(exam: Exam) -> CheckResult:
    """Whether contexts outgrow the draft, and whether acceptance falls with them."""
    name, patient = "window", exam.patient
    if patient.trained is None or not exam.chain.places:
        return CheckResult.skipped(name, "nothing of this draft was trained for the target")
    longest = max(place.context for place in exam.chain.places)
    most = _max_positions(patient)
    windows = _windows(patient.module)
    figures = {"longest_context": longest, "max_positions": most, "windows": windows}
    found = []
    if most is not None and longest > most:
        found.append(
            Finding(
                severity=Severity.PROBLEM,
                what="contexts are longer than the draft was made for",
                evidence=f"contexts of up to {longest} tokens, max_position_embeddings {most}",
                advice="use a draft trained for long contexts; until then --draft lookup there",
            )
        )
    elif most is not None and most < patient.target.info.max_positions:
        found.append(
            Finding(
                severity=Severity.NOTE,
                what=f"the draft was made for contexts of up to {most} tokens",
                evidence=f"the target goes to {patient.target.info.max_positions}",
                advice="expect less acceptance beyond; dspark eval shows it by context length",
            )
        )
    fall = _fall(exam.chain, windows)
    if fall is not None:
        edge, short, long = fall
        found.append(
            Finding(
                severity=Severity.WARNING,
                what="acceptance falls with the length of the context",
                evidence=f"tau {short:.2f} up to {edge} tokens of context, {long:.2f} beyond",
                advice="the draft may lose sight of the context: check its window "
                f"({windows or 'none'}) and positions",
            )
        )
    seen = f"contexts of up to {longest} tokens"
    return CheckResult(name=name, findings=tuple(found), seen=seen, figures=figures)


def _max_positions(patient: Patient) -> int | None:
    if patient.module is not None:
        return patient.module.config.backbone.max_positions
    inner = patient.config.get("transformer_layer_config")
    for holder in (patient.config, inner if isinstance(inner, dict) else {}):
        value = holder.get("max_position_embeddings")
        if isinstance(value, int):
            return value
    return None


def _windows(module: DSparkModule | None) -> list[int]:
    if module is None:
        return []
    return sorted({window.size for window in module.windows if window is not None})


def _fall(run: Replay, windows: list[int]) -> tuple[int, float, float] | None:
    """Where tau falls, and from what to what; None where it does not, or nothing can be said."""
    contexts = sorted(place.context for place in run.places)
    edges = [*windows, contexts[len(contexts) // 2]]
    for edge in edges:
        groups = [
            [place for place in run.places if (place.context > edge) is is_long]
            for is_long in (False, True)
        ]
        # Each side needs several texts: one text alone is easier or harder than another.
        if any(len({place.trace for place in group}) < 3 for group in groups):
            continue
        committed = [np.array([place.committed for place in group]) for group in groups]
        if any(len(values) < 20 for values in committed):
            continue
        short, long = (float(values.mean()) for values in committed)
        error = sum(float(values.var()) / len(values) for values in committed) ** 0.5
        if long < _FALL * short and short - long > 4 * error:
            return edge, short, long
    return None


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
