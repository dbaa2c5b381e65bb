"""Checks of the machine: exact mode, threads, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from dspark.eval.doctor.exam import Exam
from dspark.eval.doctor.findings import CheckResult, Finding, Severity
from dspark.eval.doctor.machine import cores, free_memory, load_average, swapped_bytes
from dspark.eval.profile_steps import StepBench, sample_texts
from dspark.models.text import format_bytes
from dspark.target import Target

__all__ = ["check_exact", "check_memory", "check_threads"]

_SLOWER = 1.2  # than one thread
_CONTEXT = 64
_STEPS = 5
_MUCH_SWAP = 64 << 20
_RESERVE = 512 << 20


def check_exact(target: Target) -> CheckResult:
    """Whether exact mode is on, and why not."""
    report = target.exactness
    if report.enabled:
        return CheckResult(name="exact mode", seen=report.reason)
    found = Finding(
        severity=Severity.NOTE,
        what="exact mode is off: where two tokens nearly tie, drafted text may differ from plain",
        evidence=report.reason,
        advice="use --exact if it holds here, or another --dtype; dspark audit tells ties from "
        "losses",
    )
    return CheckResult(name="exact mode", findings=(found,))


def check_threads(
    exam: Exam, *, count: int | None = None, clock: Callable[[], float] = time.perf_counter
) -> CheckResult:
    """Whether the threads in use fit the cores, by count and by the clock.

    Args:
        exam: The pair.
        count: Cores; None asks the machine.
        clock: Seconds of now.
    """
    name, target = "threads", exam.patient.target
    if not target.info.device.startswith("cpu"):
        return CheckResult.skipped(name, f"the target is on {target.info.device}")
    have = cores() if count is None else count
    used, load = torch.get_num_threads(), load_average()
    figures: dict[str, object] = {"threads": used, "cores": have, "load": load}
    seconds = _time_threads(target, sorted({1, used, have}), clock)
    figures["step_seconds"] = {str(number): value for number, value in seconds.items()}
    listed = ", ".join(f"{n}: {1000 * value:.1f} ms" for n, value in seconds.items())
    evidence = f"{have} cores; a step by threads takes {listed}"
    if load is not None:
        evidence += f"; load {load:.1f}"
    found = []
    if used > have:
        found.append(
            Finding(
                severity=Severity.PROBLEM,
                what=f"{used} threads share {have} cores",
                evidence=evidence,
                advice=f"use --threads {have}, and unset OMP_NUM_THREADS if it is set",
            )
        )
    elif seconds[used] > _SLOWER * seconds[1]:
        found.append(
            Finding(
                severity=Severity.WARNING,
                what=f"one thread is faster than {used}: other programs keep the cores busy",
                evidence=evidence,
                advice="stop them, or use --threads 1 while they run",
            )
        )
    elif _SLOWER * seconds[have] < seconds[used]:
        found.append(
            Finding(
                severity=Severity.NOTE,
                what=f"{have} threads would be faster than {used}",
                evidence=evidence,
                advice=f"use --threads {have}",
            )
        )
    seen = f"{used} of {have} cores; a step by threads takes {listed}"
    return CheckResult(name=name, findings=tuple(found), seen=seen, figures=figures)


def _time_threads(
    target: Target, counts: list[int], clock: Callable[[], float]
) -> dict[int, float]:
    """Median seconds of a one-row step by threads, taking turns."""
    context = max(1, min(_CONTEXT, target.info.max_positions - 1))
    bench = StepBench(target, sample_texts(target, None, 1, context), clock)
    bench.extend(context)
    before = torch.get_num_threads()
    samples: dict[int, list[float]] = {count: [] for count in counts}
    try:
        for turn in range(_STEPS + 1):
            for count in counts:
                torch.set_num_threads(count)
                seconds = bench.step([1])
                if turn:  # the first turn warms up
                    samples[count].append(seconds)
    finally:
        torch.set_num_threads(before)
        bench.close()
    return {count: statistics.median(values) for count, values in samples.items()}


def check_memory(exam: Exam, *, free: int | None = None, swapped: int | None = None) -> CheckResult:
    """Whether memory is left for the cache, and nothing is swapped.

    Args:
        exam: The pair.
        free: Bytes that are free; None asks the machine.
        swapped: Bytes of this process that were swapped out; None asks the machine.
    """
    name, info = "memory", exam.patient.target.info
    room = free_memory() if free is None else free
    out = swapped_bytes() if swapped is None else swapped
    per_token = _bytes_per_token(exam.patient.target)
    need = None if per_token is None else per_token * info.max_positions
    figures = {"free": room, "swapped": out, "cache_bytes_per_token": per_token}
    found = []
    if out > _MUCH_SWAP:
        found.append(
            Finding(
                severity=Severity.PROBLEM,
                what="part of the model has been swapped out",
                evidence=f"{format_bytes(out)} of this process are on disk",
                advice="free memory, use a smaller model or --dtype bfloat16, and for DeepSeek-V4 "
                "--expert-memory",
            )
        )
    if room is not None and room < _RESERVE:
        found.append(
            Finding(
                severity=Severity.PROBLEM,
                what="there is hardly any memory left",
                evidence=f"{format_bytes(room)} are free with the target and the draft loaded",
                advice="close other programs, or use a smaller model or draft",
            )
        )
    elif room is not None and need is not None and need > room:
        fits = int(room / (per_token or 1))
        found.append(
            Finding(
                severity=Severity.NOTE,
                what=f"a single context may grow to about {fits} tokens, not {info.max_positions}",
                evidence=f"{format_bytes(room)} free, {format_bytes(per_token or 0)} of cache a "
                "token",
                advice="limit contexts, or the cache with EngineConfig(memory_limit=...)",
            )
        )
    left = "" if room is None else f"{format_bytes(room)} free"
    seen = left if per_token is None else f"{left}, {format_bytes(per_token)} of cache a token"
    return CheckResult(name=name, findings=tuple(found), seen=seen, figures=figures)


def _bytes_per_token(target: Target) -> int | None:
    """Bytes of cache that a token takes, None where pages do not tell."""
    cache = target.new_cache()
    tokens = cache.usage().page_tokens
    return cache.page_bytes() // tokens if tokens > 0 else None
