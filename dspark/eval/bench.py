"""A benchmark: the same prompts through several configurations, interleaved, resumed, repeated.

Repeats are the outer loop, then concurrency, then configurations, then prompts; the order of the
configurations moves on by one from one turn to the next, so that none is always first. A slow
minute of the machine then falls on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dspark.errors import ConfigError
from dspark.eval.bench_figures import bench_figures
from dspark.eval.bench_log import BenchLog, RunName
from dspark.eval.bench_memory import MemoryWatch
from dspark.eval.bench_records import RunRecord
from dspark.eval.runners.base import BenchRequest, Runner
from dspark.request import Rule, SamplingParams

__all__ = [
    "SCHEMA",
    "VERSION",
    "Bench",
    "Contestant",
    "Planned",
    "Skipped",
    "Watcher",
    "plan_runs",
]

SCHEMA = "dspark.bench"
VERSION = 1

_SAME_TEXT = (Rule.GREEDY, Rule.COUPLED, Rule.SAMPLE_MATCH)
"""Rules under which a draft does not change one token of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A configuration and what runs it.

    Attributes:
        name: What tables call it.
        kind: "dspark", "transformers", "llama.cpp" or "openai".
        runner: Runs it.
        params: Sampling parameters.
        facts: Draft, mode, url and exact mode, as the result file has them.
        identity: What else decides its figures, such as checksums.
    """

    name: str
    kind: str
    runner: Runner
    params: SamplingParams
    facts: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_own_text(self) -> bool:
        """True if its answers must be those of dspark's plain decoding."""
        return self.kind == "dspark" and self.params.resolved_rule in _SAME_TEXT


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One run to be done."""

    contestant: Contestant
    concurrency: int
    repeat: int

    @property
    def name(self) -> RunName:
        """What the log calls it."""
        return self.contestant.name, self.concurrency, self.repeat


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A configuration that is not run at a concurrency, and why."""

    configuration: str
    concurrency: int
    reason: str


class Watcher(Protocol):
    """Whoever watches a benchmark go on."""

    def preparing(self, contestant: Contestant) -> None:
        """A runner loads."""
        ...

    def warming_up(self, planned: Planned) -> None:
        """A configuration runs without being measured."""
        ...

    def started(self, planned: Planned) -> None:
        """A run begins."""
        ...

    def advanced(self, share: float) -> None:
        """So much of the run is done, 0 to 1."""
        ...

    def finished(self, planned: Planned, record: RunRecord, *, is_fresh: bool) -> None:
        """A run is done, just now or in an earlier call of the command."""
        ...

    def dropped(self, planned: Planned) -> None:
        """A run is left out, since no request of the one before succeeded."""
        ...


def plan_runs(
    contestants: Sequence[Contestant], concurrencies: Sequence[int], repeats: int
) -> tuple[list[Planned], list[Skipped]]:
    """Every run in its order, and what cannot be run.

    Args:
        contestants: Configurations, with names that differ.
        concurrencies: Requests under way at a time, each >= 1.
        repeats: Runs of each, >= 1.

    Raises:
        ConfigError: If a name is given twice.
    """
    names = [contestant.name for contestant in contestants]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"the configuration {twice!r} was asked for twice.")
    levels = list(dict.fromkeys(concurrencies))
    skipped, able = [], dict[int, list[Contestant]]()
    for concurrency in levels:
        able[concurrency] = []
        for contestant in contestants:
            reason = contestant.runner.refuses(concurrency)
            if reason is None:
                able[concurrency].append(contestant)
            else:
                skipped.append(
                    Skipped(configuration=contestant.name, concurrency=concurrency, reason=reason)
                )
    planned, turn = [], 0
    for repeat in range(repeats):
        for concurrency in levels:
            found = able[concurrency]
            first = turn % max(1, len(found))
            turn += 1
            planned += [
                Planned(contestant=contestant, concurrency=concurrency, repeat=repeat)
                for contestant in found[first:] + found[:first]
            ]
    return planned, skipped


class Bench:
    """Runs what is planned.

    Args:
        contestants: Configurations.
        requests: The prompts.
        concurrencies: Requests under way at a time.
        repeats: Runs of each configuration that count.
        warm_ups: Runs before the first that counts, of as many prompts as are under way at a time.
        device: Where the target runs, to read its memory.
        log: Where finished runs are kept, or None.

    Raises:
        ConfigError: If two configurations have one name.
    """

    def __init__(
        self,
        contestants: Sequence[Contestant],
        requests: Sequence[BenchRequest],
        *,
        concurrencies: Sequence[int] = (1,),
        repeats: int = 3,
        warm_ups: int = 1,
        device: str = "cpu",
        log: BenchLog | None = None,
    ) -> None:
        self._contestants = list(contestants)
        self._requests = list(requests)
        self._warm_ups = warm_ups
        self._device = device
        self._log = log
        self.planned, self.skipped = plan_runs(contestants, concurrencies, repeats)
        self.dropped: list[Skipped] = []
        self.runs: list[RunRecord] = []
        self.resumed = 0

    def run(self, watcher: Watcher) -> None:
        """Do every run that the log does not hold.

        Args:
            watcher: Told what happens.

        Raises:
            DsparkError: If a runner cannot be prepared; nothing has been run then.
            KeyboardInterrupt: Passed on; finished runs are in the log.
        """
        todo = [planned for planned in self.planned if self._find(planned) is None]
        lost: set[tuple[str, int]] = set()
        try:
            self._prepare(todo, watcher)
            self._warm_up(todo, watcher)
            for planned in self.planned:
                found = self._find(planned)
                if found is not None:
                    self.resumed += 1
                elif planned.name[:2] in lost:
                    watcher.dropped(planned)
                    continue
                record = found or self._measure(planned, watcher)
                if record.output.is_lost:
                    lost.add(planned.name[:2])
                    self._drop(planned)
                self.runs.append(record)
                watcher.finished(planned, record, is_fresh=found is None)
        finally:
            for contestant in self._contestants:
                contestant.runner.close()

    def results(self, header: Mapping[str, Any], *, baseline: str, seed: int) -> dict[str, Any]:
        """The result file.

        Args:
            header: Made by `build_header`.
            baseline: The configuration that speed-ups are relative to.
            seed: Of the bootstrap.
        """
        params = self._contestants[0].params
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "header": dict(header),
            "baseline": baseline,
            "configurations": [_describe(contestant) for contestant in self._contestants],
            "skipped": [
                {
                    "configuration": item.configuration,
                    "concurrency": item.concurrency,
                    "reason": item.reason,
                }
                for item in [*self.skipped, *self.dropped]
            ],
            "resumed": self.resumed,
            "runs": [run.to_json() for run in self.runs],
            "figures": bench_figures(
                self.runs,
                baseline=baseline,
                seed=seed,
                texts_of=frozenset(c.name for c in self._contestants if c.has_own_text),
                expected_tokens=params.max_tokens if params.ignore_eos else None,
            ),
        }

    # -- inside -------------------------------------------------------------------------------

    def _find(self, planned: Planned) -> RunRecord | None:
        return None if self._log is None else self._log.find(planned.name)

    def _drop(self, planned: Planned) -> None:
        reason = f"no request of repeat {planned.repeat + 1} succeeded, so later ones are left out"
        self.dropped.append(
            Skipped(
                configuration=planned.contestant.name,
                concurrency=planned.concurrency,
                reason=reason,
            )
        )

    def _prepare(self, todo: Sequence[Planned], watcher: Watcher) -> None:
        wanted = {planned.contestant.name for planned in todo}
        for contestant in self._contestants:
            if contestant.name in wanted:
                watcher.preparing(contestant)
                contestant.runner.prepare()

    def _warm_up(self, todo: Sequence[Planned], watcher: Watcher) -> None:
        firsts = {planned.name[:2]: planned for planned in reversed(todo)}
        for planned in [planned for planned in todo if firsts[planned.name[:2]] is planned]:
            few = self._requests[: planned.concurrency]
            for _ in range(self._warm_ups):
                watcher.warming_up(planned)
                planned.contestant.runner.run(few, planned.concurrency, _ignore)

    def _measure(self, planned: Planned, watcher: Watcher) -> RunRecord:
        watcher.started(planned)
        runner = planned.contestant.runner
        memory = MemoryWatch(self._device)
        output = runner.run(self._requests, planned.concurrency, watcher.advanced)
        record = RunRecord(
            configuration=planned.contestant.name,
            concurrency=planned.concurrency,
            repeat=planned.repeat,
            output=output,
            memory=memory.read(cache=output.cache_bytes, is_local=runner.is_local),
        )
        if self._log is not None and record.is_whole:
            self._log.append(record)
        return record


def _describe(contestant: Contestant) -> dict[str, Any]:
    from dspark.eval.results import describe_params

    library = contestant.runner.library
    return {
        "name": contestant.name,
        "runner": contestant.kind,
        **{key: contestant.facts.get(key) for key in ("draft", "mode", "url")},
        "sampling": describe_params(contestant.params),
        "library": None if library is None else dict(library),
        "is_exact": contestant.facts.get("is_exact"),
        "note": "; ".join(contestant.runner.notes) or None,
    }


def _ignore(share: float) -> None:
    """Report to nobody."""
