"""Speculation counters of a server, read from its /metrics page (Prometheus text format).

**Source:** vLLM's `vllm:spec_decode_*` and SGLang's `sglang:spec_*` metrics; which of them are
counters the page's own TYPE lines say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dspark.eval.bench_records import RunOutput

__all__ = ["ServerCounters", "apply_counters", "parse_metrics"]

_SAMPLE = re.compile(r"(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_POSITION = re.compile(r'(?:^|,)position="([^"]*)"')
_TYPE = re.compile(r"# TYPE (\S+) (\w+)")
_WANTED = ("vllm:spec_", "sglang:spec_")


@dataclass(frozen=True, slots=True)
class ServerCounters:
    """What a /metrics page said.

    Attributes:
        counters: Values that only grow, by name, summed over engines; those told by position have
            it in braces.
        gauges: Values of the moment, by name; the last engine's.
        names: All metric names on the page.
    """

    counters: Mapping[str, float] = field(default_factory=dict)
    gauges: Mapping[str, float] = field(default_factory=dict)
    names: frozenset[str] = frozenset()

    def since(self, before: ServerCounters) -> dict[str, float]:
        """Growth of the counters since `before`, and the gauges as they are."""
        grown = {k: v - before.counters.get(k, 0.0) for k, v in self.counters.items()}
        return {**grown, **self.gauges}


def parse_metrics(text: str) -> ServerCounters:
    """Read a /metrics page; lines that are not in the format are passed over."""
    kinds: dict[str, str] = {}
    counters: dict[str, float] = {}
    gauges: dict[str, float] = {}
    names = set()
    for line in text.splitlines():
        if found := _TYPE.match(line):
            kinds[found[1]] = found[2]
            continue
        sample = _SAMPLE.fullmatch(line.strip())
        if sample is None:
            continue
        name = sample["name"]
        names.add(name)
        value = _number(sample["value"])
        if not name.startswith(_WANTED) or name.endswith("_created") or value is None:
            continue
        position = _POSITION.search(sample["labels"] or "")
        key = name if position is None else f'{name}{{position="{position[1]}"}}'
        kind = kinds.get(name) or kinds.get(name.removesuffix("_total"))
        if kind == "counter" or name.endswith("_total"):
            counters[key] = counters.get(key, 0.0) + value
        else:
            gauges[key] = value
    return ServerCounters(counters, gauges, frozenset(names))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None  # not NaN either


def apply_counters(output: RunOutput, counters: Mapping[str, float]) -> RunOutput:
    """Put what a server counted over a run into the run's figures.

    vLLM counts rounds that had a draft: tau = 1 + accepted / rounds. SGLang counts verification
    calls: tau = tokens after each answer's first / calls.
    """
    output = replace(output, counters=counters)
    drafts = counters.get("vllm:spec_decode_num_drafts_total", 0.0)
    if drafts > 0:
        proposed = int(counters.get("vllm:spec_decode_num_draft_tokens_total", 0))
        accepted = int(counters.get("vllm:spec_decode_num_accepted_tokens_total", 0))
        return replace(
            output,
            rounds=int(drafts),
            proposed=proposed,
            verified=proposed,
            accepted=accepted,
            tau=1 + accepted / drafts,
        )
    calls = counters.get("sglang:spec_verify_calls_total", 0.0)
    if calls > 0:
        answers = sum(item.error is None for item in output.requests)
        return replace(
            output, rounds=int(calls), tau=max(0, output.output_tokens - answers) / calls
        )
    return output
