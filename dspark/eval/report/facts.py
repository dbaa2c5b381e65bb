"""What was run, on what, and how: the table that figures mean nothing without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dspark.eval.report.numbers import NONE, value_text
from dspark.eval.report.page import Table
from dspark.eval.report.read import Inputs, ResultFile
from dspark.eval.report.schema import AuditResults, Header, Model, PromptSetFacts

__all__ = ["describe_sampling", "run_table"]

_QUIET: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "stop": [],
    "n": 1,
    "logprobs": None,
    "ignore_eos": False,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "bad_words": [],
    "draft": True,
    "depth": None,
    "width": None,
    "tree_budget": None,
}
"""Sampling parameters that say nothing while they have these values."""

_WORDS = {"max_tokens": "max tokens", "tree_budget": "tree budget", "ignore_eos": "ignore EOS"}


def run_table(inputs: Inputs) -> Table:
    """One row per fact: one value where all files agree, else one per file."""
    rows: dict[str, dict[str, list[str]]] = {}
    names = [(f"file {file.label}", f"{file.name}, dspark {file.kind}") for file in inputs.files]
    for file in inputs.files:
        for name, value in _facts(file):
            rows.setdefault(name, {}).setdefault(value, []).append(file.label)
    return Table(
        title="Set-up",
        columns=("", ""),
        rows=[
            *(names if len(names) > 1 else []),
            *((name, _one_or_each(values)) for name, values in rows.items()),
        ],
        texts=frozenset({0, 1}),
    )


def _one_or_each(values: dict[str, list[str]]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{', '.join(labels)}: {value}" for value, labels in values.items())


def describe_sampling(sampling: dict[str, Any]) -> str:
    """Sampling parameters in a line: temperature, length and rule, and what is not at rest."""
    parts = []
    for name in ("temperature", "max_tokens", "rule"):
        if name in sampling:
            parts.append(f"{_WORDS.get(name, name)} {value_text(sampling[name])}")
    for name, value in sampling.items():
        if name in ("temperature", "max_tokens", "rule"):
            continue
        if name not in _QUIET or value != _QUIET[name]:
            word = _WORDS.get(name, name)
            parts.append(word if value is True else f"{word} {value_text(value)}")
    return ", ".join(parts)


def _facts(file: ResultFile[Any]) -> Iterator[tuple[str, str]]:
    header: Header = file.results.header
    yield from _machine_facts(header)
    if isinstance(file.results, AuditResults):
        yield "audited draft", "; ".join(_model(draft) for draft in header.drafts)
        yield "audit", _settings(file.results.settings)
    elif file.kind != "profile":  # whose steps know neither prompts nor sampling
        yield from _workload_facts(header)
    if header.exact.enabled is not None:
        yield "exact mode", header.exact.reason or ("on" if header.exact.enabled else "off")
    yield "software", _software(header)
    if header.command:
        yield "command", header.command


def _machine_facts(header: Header) -> Iterator[tuple[str, str]]:
    if header.processor or header.platform:
        parts = (header.processor, header.platform)
        yield "machine", ", ".join(part for part in parts if part)
    if header.device is not None:
        yield "device", header.device
    if header.threads is not None:
        yield "threads", str(header.threads)
    yield "target", _model(header.target)


def _workload_facts(header: Header) -> Iterator[tuple[str, str]]:
    if header.drafts:
        yield "drafts", "; ".join(_model(draft) for draft in header.drafts)
    if header.prompts:
        yield "prompts", "; ".join(_prompts(item) for item in header.prompts)
    if header.sampling:
        lines = dict.fromkeys(describe_sampling(item) for item in header.sampling)
        yield "sampling", "; ".join(lines)
    if header.template is not None:
        think = {None: "", True: ", thinking", False: ", no thinking"}[header.think]
        effort = "" if header.effort is None else f", effort {header.effort}"
        yield "template", header.template + think + effort
    parts = [
        f"{name.replace('_', '-')} {getattr(header, name)}"
        for name in ("seed", "batch", "warm_ups", "repeats")
        if getattr(header, name) is not None
    ]
    if header.concurrencies:
        parts.append(f"concurrency {', '.join(map(str, header.concurrencies))}")
    if parts:
        yield "run", ", ".join(parts)


def _model(model: Model) -> str:
    parts = [model.family, model.dtype]
    if model.quant != "none":
        parts.append(f"{model.quant} weights")
    if model.num_layers is not None:
        parts.append(f"{model.num_layers} layers")
    if model.revision:
        parts.append(f"revision {model.revision[:12]}")
    if model.fingerprint:
        parts.append(f"fingerprint {model.fingerprint[:12]}")
    told = ", ".join(part for part in parts if part)
    return f"{model.id} ({told})" if told else model.id


def _prompts(prompts: PromptSetFacts) -> str:
    parts = [] if prompts.count is None else [f"{prompts.count} questions"]
    if prompts.turns is not None and prompts.turns != prompts.count:
        parts.append(f"{prompts.turns} turns")
    if prompts.revision:
        parts.append(f"revision {prompts.revision[:12]}")
    if prompts.sha256:
        parts.append(f"sha256 {prompts.sha256[:12]}")
    return f"{prompts.name} ({', '.join(parts)})" if parts else prompts.name


def _software(header: Header) -> str:
    parts = [f"dspark {header.dspark or NONE}"]
    if header.commit:
        state = ", with changes" if header.dirty else ""
        parts[0] += f" (commit {header.commit[:12]}{state})"
    if header.python:
        parts.append(f"Python {header.python}")
    return ", ".join([*parts, *(f"{name} {found}" for name, found in header.libraries.items())])


def _settings(settings: dict[str, Any]) -> str:
    names: Sequence[str] = ("level", "rules", "temperatures", "seed")
    return ", ".join(f"{name} {value_text(settings[name])}" for name in names if name in settings)
