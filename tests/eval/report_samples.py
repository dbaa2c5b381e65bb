"""Result files to make reports of: the code's own figures of hand-made runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark.eval.acceptance import acceptance, by_category, by_context
from dspark.eval.audit_report import AuditReport, CheckResult, Status
from dspark.eval.bench_figures import bench_figures
from dspark.eval.bench_records import Memory, RequestRecord, RunOutput, RunRecord
from dspark.eval.confidence import confidence
from dspark.eval.definitions import apply_definition
from dspark.eval.profile import ExpertCount, Profile, ProfileKey, ProfilePoint
from dspark.eval.records import QuestionRecord, all_rounds
from dspark.eval.results import describe_params
from dspark.request import SamplingParams
from tests.eval.log_of import chain_round, record_of, turn_of

CATEGORIES = ("writing", "code", "editing")
FINGERPRINT = "5f" * 32
PROMPTS = {
    "name": "dspark",
    "revision": None,
    "count": 12,
    "turns": 12,
    "sha256": "ab" * 32,
    "categories": dict.fromkeys(CATEGORIES, 4),
}
EXACT = {
    "enabled": True,
    "holds": True,
    "min_rows": 1,
    "max_nodes": None,
    "backend": "blocked",
    "cost": 0.02,
    "reason": "on, at a cost of 2 %",
}


def header_of(*, drafts: Sequence[str] = ("lookup",), **more: Any) -> dict[str, Any]:
    """A header as `build_header` makes it."""
    return {
        "created": "2026-11-22T08:30:00+00:00",
        "command": "dspark eval --draft lookup",
        "dspark": "0.1.0",
        "code": "0123456789abcdef",
        "commit": "c0" * 20,
        "dirty": False,
        "libraries": {"torch": "2.13.0", "transformers": "5.23.0"},
        "python": "3.11.7",
        "platform": "Linux x86_64",
        "processor": "Example CPU @ 2.50GHz",
        "device": "cpu",
        "threads": 2,
        "target": {
            "id": "smollm2-135m",
            "revision": None,
            "source": None,
            "fingerprint": FINGERPRINT,
            "family": "llama",
            "dtype": "float32",
            "vocab_size": 49152,
            "num_layers": 30,
        },
        "drafts": [_model(name) for name in drafts],
        "sampling": [describe_params(SamplingParams(max_tokens=48))],
        "prompts": [copy.deepcopy(PROMPTS)],
        "exact": dict(EXACT),
        "template": "chat",
        "think": None,
        "effort": None,
        "seed": 0,
        "batch": 1,
        "warm_ups": 1,
        "repeats": 3,
        **more,
    }


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "revision": None, "source": None, "fingerprint": None}


def eval_cell(
    draft: str,
    *,
    luck: float = 0.6,
    params: SamplingParams | None = None,
    seed: int = 0,
    definitions: Sequence[str] = (),
) -> dict[str, Any]:
    """A configuration of which every drafted token is accepted with a chance that decays."""
    rng = np.random.default_rng(seed)
    records = [
        _question(rng, at, CATEGORIES[at % 3], 0.0 if draft == "none" else luck + 0.1 * (at % 3))
        for at in range(12)
    ]
    params = params or SamplingParams(max_tokens=48)
    quality = confidence(all_rounds(records))
    law = {"rule": params.resolved_rule.value, "temperature": params.temperature}
    return {
        "name": f"{draft} T={params.temperature:g} dspark",
        "prompts": copy.deepcopy(PROMPTS),
        "sampling": describe_params(params),
        "failed": [],
        "acceptance": acceptance(records),
        "by_category": by_category(records),
        "by_context": by_context(records),
        "confidence": None if quality is None else {**law, **quality},
        "definitions": {name: apply_definition(name, records, params) for name in definitions},
        "resumed": 0,
        "draft": {**_model(draft), "name": draft},
    }


def _question(rng: np.random.Generator, at: int, category: str, luck: float) -> QuestionRecord:
    rounds = []
    for _ in range(10):
        if luck == 0.0:
            rounds.append(chain_round(0, 0))
            continue
        survival = tuple(np.cumprod([luck, luck - 0.05, luck - 0.1, luck - 0.1]).tolist())
        accepted = int(sum(rng.random() < s for s in survival))
        rounds.append(chain_round(accepted, 4, survival=survival))
    return record_of(turn_of(*rounds, prompt=30), question_id=at, category=category)


def eval_results(*cells: dict[str, Any], **header: Any) -> dict[str, Any]:
    """A file of `dspark eval`; `header` replaces keys of its header."""
    found = cells or (eval_cell("none"), eval_cell("lookup", definitions=("vllm",)))
    drafts = [cell["draft"]["id"] for cell in found]
    return _as_json(
        {
            "schema": "dspark.eval",
            "version": 1,
            "header": header_of(drafts=drafts, **header),
            "configurations": list(found),
        }
    )


def bench_results(
    *,
    speeds: dict[str, float] | None = None,
    concurrencies: Sequence[int] = (1,),
    budgets: Sequence[int] = (),
    is_same_text: bool = True,
    noise: float = 0.03,
    seed: int = 0,
    **header: Any,
) -> dict[str, Any]:
    """A file of `dspark bench`: configurations by their speed over that of plain decoding."""
    speeds = speeds or {"plain": 1.0, "lookup": 1.3}
    if budgets:
        speeds = {"plain": 1.0, **{f"lookup {b}": 1 + 0.1 * b**0.5 for b in budgets}}
    rng = np.random.default_rng(seed)
    runs = [
        _run(rng, name, speed, concurrency, repeat, noise=noise, is_same_text=is_same_text)
        for repeat in range(3)
        for concurrency in concurrencies
        for name, speed in speeds.items()
    ]
    shape = dict(zip(list(speeds)[1:], budgets, strict=False))
    results = {
        "schema": "dspark.bench",
        "version": 1,
        "header": header_of(**header),
        "baseline": "plain",
        "configurations": [_bench_configuration(name, shape.get(name)) for name in speeds],
        "skipped": [],
        "resumed": 0,
        "runs": [run.to_json() for run in runs],
        "figures": bench_figures(runs, baseline="plain", seed=0, texts_of=frozenset(speeds)),
    }
    return _as_json(results)


def _bench_configuration(name: str, budget: int | None) -> dict[str, Any]:
    params = SamplingParams(max_tokens=48, tree_budget=budget)
    return {
        "name": name,
        "runner": "dspark",
        "draft": "none" if name == "plain" else "lookup",
        "mode": None,
        "url": None,
        "sampling": describe_params(params),
        "library": {"name": "dspark", "version": "0.1.0"},
        "is_exact": True,
        "note": None,
    }


def _run(
    rng: np.random.Generator,
    name: str,
    speed: float,
    concurrency: int,
    repeat: int,
    *,
    noise: float,
    is_same_text: bool,
) -> RunRecord:
    """Twelve answers of 48 tokens; a batch is faster together and slower for each."""
    rate = 15 * speed * (1 + 0.6 * np.log2(concurrency))
    requests = []
    for at in range(12):
        wall = 48 / rate * float(np.exp(noise * rng.normal()))
        gap = wall / 12
        is_other = not is_same_text and name != "plain" and at == 0
        requests.append(
            RequestRecord(
                question_id=at,
                category=CATEGORIES[at % 3],
                prompt_tokens=30,
                output_tokens=48,
                ttft=0.08 * concurrency,
                seconds=wall * concurrency,
                gaps=tuple((gap * concurrency, 4) for _ in range(11)),
                rounds=24 if name != "plain" else 47,
                committed=47,
                digest="other" if is_other else f"digest {at}",
            )
        )
    seconds = sum(item.seconds for item in requests) / concurrency
    stages = {"prefill": 0.1, "draft": 0.05, "verify": 0.7, "rest": 0.15}
    output = RunOutput(
        seconds=seconds,
        requests=tuple(requests),
        rounds=288,
        tau=47 / 24 if name != "plain" else 1.0,
        stages={key: share * seconds for key, share in stages.items()},
    )
    memory = Memory(peak_rss=900 << 20, cache=12 << 20)
    return RunRecord(
        configuration=name, concurrency=concurrency, repeat=repeat, output=output, memory=memory
    )


def profile_results(
    *, speed: float = 1.0, has_experts: bool = False, **header: Any
) -> dict[str, Any]:
    """A file of `dspark profile`."""
    found = header_of(template="raw", seed=None, drafts=(), **header)
    points = tuple(
        ProfilePoint(
            context=context,
            rows=rows,
            requests=1,
            median=seconds,
            low=0.96 * seconds,
            high=1.05 * seconds,
            repeats=7,
        )
        for context in (64, 512)
        for rows in (1, 2, 4, 8, 16)
        for seconds in [(0.03 + 0.0015 * rows + 1e-5 * context) / speed]
    )
    key = ProfileKey(
        target=found["target"]["fingerprint"],
        device=found["device"],
        processor=found["processor"],
        dtype=found["target"]["dtype"],
        threads=found["threads"],
        exact=found["exact"]["enabled"],
        torch=found["libraries"]["torch"],
    )
    experts = (
        ExpertCount(rows=1, distinct_experts=6.0),
        ExpertCount(rows=8, distinct_experts=31.5),
    )
    profile = Profile(
        key=key,
        points=points,
        experts=experts if has_experts else None,
        settings={"rows_per_request": 16, "repeats": 7, "tokens": "text", "seed": 0},
        header=found,
    )
    return _as_json(profile.to_json())


def audit_results(
    *, status: Status = Status.PASSED, is_interrupted: bool = False, **header: Any
) -> dict[str, Any]:
    """A file of `dspark audit`."""
    checks = [
        CheckResult(
            name="trees and rollback",
            status=Status.PASSED,
            evidence="12 trees and 12 rollbacks agree bitwise with a fresh prefill.",
            seconds=3.2,
        ),
        CheckResult(
            name="tokens, greedy",
            status=status,
            evidence="2,304 tokens over 6 prompts.",
            power="a fault that changes one token in 1,000",
            advice="keep exact mode on" if status is Status.FOUND else "",
            seconds=61.0,
            details={"judged_nodes": 900},
        ),
    ]
    report = AuditReport(
        header=header_of(sampling=[], prompts=[], template="raw", warm_ups=0, repeats=1, **header),
        settings={"level": "quick", "rules": ["greedy"], "temperatures": [1.0], "seed": 0},
        checks=checks,
        is_interrupted=is_interrupted,
        seconds=64.2,
    )
    return _as_json(report.as_json())


def _as_json(results: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the file would get: lists for tuples."""
    return dict(json.loads(json.dumps(results)))


def write(folder: Path, name: str, results: dict[str, Any]) -> Path:
    """Write a result file; returns its path."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    return path
