"""Sweeps: every policy at every load, and the result file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dspark.errors import ConfigError
from dspark.eval.simulate.costs import Costs
from dspark.eval.simulate.figures import compare_frontiers, frontier, point_figures
from dspark.eval.simulate.policy import Policy
from dspark.eval.simulate.pool import Pool
from dspark.eval.simulate.run import Limits, Server, simulate
from dspark.eval.simulate.workload import Lengths, Workload, closed_loop, open_loop

__all__ = ["SCHEMA", "VERSION", "Load", "Sweep", "compare_policies"]

SCHEMA = "dspark.simulate"
VERSION = 1

_LANES = 1024  # slots simulated side by side, about
_LEAST_TURNS = 8  # requests that a slot of a replica sees at the least, if there are several
_LEAST_OWN = 3  # and if there is one

Progress = Callable[[float, str], None]
"""Told the share that is done, and the point under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How requests come.

    Attributes:
        concurrency: Requests under way at all times; None for arrivals.
        rate: Requests a second, arriving as a Poisson process; None for a closed loop.
    """

    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ConfigError("a load is a concurrency or a rate, and not both.")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"the concurrency is {self.concurrency}, but must be >= 1.")

    @property
    def name(self) -> str:
        """For people."""
        if self.concurrency is not None:
            return f"concurrency {self.concurrency}"
        return f"{self.rate:g} requests/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is simulated.

    Attributes:
        policies: Ways to serve.
        loads: Loads.
        pools: Proposals by source: "chain", "mtp", "tree".
        costs: What rounds take.
        limits: Sizes of the server; a closed loop of C has C slots, whatever `max_batch` is, up to
            that.
        lengths: Of prompts and answers; None takes them from the trace.
        requests: Requests of a point, over all replicas; in a closed loop at least three a slot.
        warm_up: Share of them that is left out.
        seed: Of all draws; every policy gets the same requests.
    """

    policies: Sequence[Policy]
    loads: Sequence[Load]
    pools: Mapping[str, Pool]
    costs: Costs
    limits: Limits
    lengths: tuple[Lengths | None, Lengths | None]
    requests: int = 2000
    warm_up: float = 0.1
    seed: int = 0
    points: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise ConfigError(f"--requests is {self.requests}, but must be >= 1.")
        for policy in self.policies:
            if policy.source is not None and policy.source not in self.pools:
                raise ConfigError(
                    f"the policy {policy.name!r} needs acceptance of a {policy.source} draft, "
                    "which is not there.",
                    hint="trees need a log with trees (--tree-trace) or --tree-recovery",
                )

    def run(self, on_progress: Progress | None = None) -> None:
        """Simulate every point, in order; those that are done are in `points`.

        Raises:
            KeyboardInterrupt: Passed on; finished points stay.
        """
        total = len(self.policies) * len(self.loads)
        for load in self.loads:
            for policy in self.policies:
                done = len(self.points)
                name = f"{policy.name}, {load.name}"

                def report(share: float, done: int = done, name: str = name) -> None:
                    if on_progress is not None:
                        on_progress((done + share) / total, name)

                self.points.append(self._point(policy, load, report))

    def _point(self, policy: Policy, load: Load, report: Callable[[float], None]) -> dict[str, Any]:
        slots = self.limits.max_batch
        if load.concurrency is not None:
            slots = min(slots, load.concurrency)
        limits = replace(self.limits, max_batch=slots)
        pool = None if policy.source is None else self.pools[policy.source]
        server = Server(policy=policy, costs=self.costs, limits=limits, pool=pool)
        outcome = simulate(server, self._workload(load, slots), seed=self.seed, on_progress=report)
        return {
            "policy": policy.name,
            "concurrency": load.concurrency,
            "rate": load.rate,
            **point_figures(outcome),
        }

    def _workload(self, load: Load, slots: int) -> Workload:
        """The same requests for every policy."""
        replicas = max(1, min(_LANES // slots, self.requests // (_LEAST_TURNS * slots)))
        own = self.requests // replicas
        warm_up = int(self.warm_up * own)
        if load.rate is None:
            # Slots that were filled at once are in step with each other for a while.
            own = max(own, _LEAST_OWN * slots)
            warm_up = max(warm_up, slots)
        source = next((p for p in self.pools.values() if p.lengths is not None), None)
        rng = np.random.default_rng([self.seed, 0])
        if load.rate is None:
            return closed_loop(
                source, self.lengths, replicas=replicas, requests=own, warm_up=warm_up, rng=rng
            )
        return open_loop(
            source,
            self.lengths,
            rate=load.rate,
            replicas=replicas,
            requests=own,
            warm_up=warm_up,
            rng=rng,
        )

    def results(
        self,
        header: Mapping[str, Any],
        *,
        acceptance: Sequence[str] = (),
        baseline: str | None,
        speeds: Sequence[float],
        is_interrupted: bool = False,
    ) -> dict[str, Any]:
        """The result file.

        Args:
            header: What was run, on what.
            acceptance: What stands behind the proposals, line by line.
            baseline: The policy that others are held against; None for none.
            speeds: Promised per-user speeds.
            is_interrupted: True if points are missing.
        """
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "header": dict(header),
            "assumptions": [*self.costs.stated, *acceptance],
            "settings": {
                "max_batch": self.limits.max_batch,
                "max_rows": self.limits.max_rows,
                "prefill_chunk": self.limits.prefill_chunk,
                "kv_tokens": self.limits.kv_tokens,
                "prompt_tokens": _law(self.lengths[0]),
                "output_tokens": _law(self.lengths[1]),
                "requests": self.requests,
                "warm_up": self.warm_up,
                "seed": self.seed,
                "pools": {source: pool.name for source, pool in self.pools.items()},
                "skips": {policy.name: policy.skips for policy in self.policies},
            },
            "baseline": baseline,
            "interrupted": is_interrupted,
            "points": self.points,
            "comparisons": compare_policies(self.points, baseline, speeds),
        }


def _law(lengths: Lengths | None) -> str:
    return "as recorded" if lengths is None else str(lengths)


def compare_policies(
    points: Sequence[dict[str, Any]], baseline: str | None, speeds: Sequence[float]
) -> list[dict[str, Any]]:
    """Every other policy's frontier against the baseline's.

    Args:
        points: All points.
        baseline: A policy's name, or None.
        speeds: Promised per-user speeds.
    """
    names = list(dict.fromkeys(point["policy"] for point in points))
    if baseline not in names:
        return []
    lines = {n: frontier([p for p in points if p["policy"] == n]) for n in names}
    return [
        {
            "policy": name,
            "baseline": baseline,
            **compare_frontiers(lines[name], lines[baseline], speeds),
        }
        for name in names
        if name != baseline
    ]
