"""The simulation: rounds of many replicas side by side, each with a clock of its own.

A round of a replica is one forward over its requests, as `dspark.rounds` runs it: whoever has a
prompt left gets a share of the prefill chunk, everybody else an anchor row and the nodes that the
schedule admits. Its seconds come from the costs, the outcome from the pool. Between rounds,
finished requests leave and waiting ones come in.

Replicas are independent runs of one and the same server. They are simulated at a time because numpy
is fast on wide arrays only, and their spread tells how sure a figure is.

Letters: M replicas, C slots, W nodes of a proposal at the most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dspark.errors import ConfigError
from dspark.eval.simulate.admission import (
    Budgets,
    FirstNodes,
    admit_alone,
    admit_jointly,
    bars,
)
from dspark.eval.simulate.costs import Costs
from dspark.eval.simulate.policy import Policy
from dspark.eval.simulate.pool import ABSENT, NEW, Pool
from dspark.eval.simulate.slots import Finished, Slots
from dspark.eval.simulate.workload import Workload
from dspark.tree import BoolArray, FloatArray, IntArray
from dspark.verify.scheduler_setting import ScheduleKind

__all__ = ["Limits", "Outcome", "Server", "simulate"]

_CHECK_EVERY = 64  # rounds between looks at progress and at replicas that have ended

Progress = Callable[[float], None]
"""Told the share of the requests that were let in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes of a server.

    Attributes:
        max_batch: Requests in a round at the most.
        max_rows: Rows of anchors and nodes of a forward; budgets shrink to fit. None for no limit.
        prefill_chunk: Prompt tokens of a forward; None if prompts are run elsewhere, so that
            requests come with their K/V and first token.
        kv_tokens: Tokens of K/V that fit; None for no limit.

    Raises:
        ConfigError: If a figure is out of range.
    """

    max_batch: int
    max_rows: int | None = None
    prefill_chunk: int | None = 512
    kv_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but must be >= 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What is simulated.

    Attributes:
        policy: How it drafts and verifies.
        costs: What a round takes.
        limits: Its sizes.
        pool: What is drafted and accepted; None for plain decoding.

    Raises:
        ConfigError: If the policy drafts and there is no pool.
    """

    policy: Policy
    costs: Costs
    limits: Limits
    pool: Pool | None = None

    def __post_init__(self) -> None:
        if self.policy.source is not None and self.pool is None:
            raise ConfigError(f"the policy {self.policy.name!r} needs proposals, but has none.")


@dataclass(slots=True)
class Outcome:
    """What replicas did while it counted, summed over each; arrays are [M].

    Attributes:
        seconds: Time of a replica that counts.
        tokens: Tokens that answers got, the one that prefill yields included.
        committed: Tokens that rounds committed.
        decode_seconds: Seconds of every request in rounds after its prefill, summed.
        request_seconds: Seconds of every request that was under way, summed.
        rounds: Forwards.
        request_rounds: Rounds of every request, summed: anchors verified.
        drafted: Of these, rounds in which nodes were verified.
        asked: Of these, rounds in which the drafter was asked.
        nodes: Drafted nodes verified.
        accepted: Drafted tokens accepted.
        prompt_tokens: Prompt tokens run.
        finished: Times of requests.
    """

    seconds: FloatArray
    tokens: FloatArray
    committed: FloatArray
    decode_seconds: FloatArray
    request_seconds: FloatArray
    rounds: FloatArray
    request_rounds: FloatArray
    drafted: FloatArray
    asked: FloatArray
    nodes: FloatArray
    accepted: FloatArray
    prompt_tokens: FloatArray
    finished: Finished = field(default_factory=Finished)

    @staticmethod
    def empty(replicas: int) -> Outcome:
        """Nothing yet."""
        return Outcome(
            seconds=np.zeros(replicas),
            tokens=np.zeros(replicas),
            committed=np.zeros(replicas),
            decode_seconds=np.zeros(replicas),
            request_seconds=np.zeros(replicas),
            rounds=np.zeros(replicas),
            request_rounds=np.zeros(replicas),
            drafted=np.zeros(replicas),
            asked=np.zeros(replicas),
            nodes=np.zeros(replicas),
            accepted=np.zeros(replicas),
            prompt_tokens=np.zeros(replicas),
        )


def simulate(
    server: Server, workload: Workload, *, seed: int = 0, on_progress: Progress | None = None
) -> Outcome:
    """Run a workload.

    Args:
        server: The server, once per replica.
        workload: The requests.
        seed: Of the draws of texts.
        on_progress: Told how far it is.

    Returns:
        What happened.

    Raises:
        ConfigError: If a request does not fit into the cache.
    """
    return _Run(server, workload, np.random.default_rng([seed, 1])).run(on_progress)


class _Run:
    """A simulation under way."""

    def __init__(self, server: Server, workload: Workload, rng: np.random.Generator) -> None:
        self._server = server
        self._policy = server.policy
        replicas, self._requests = workload.shape
        self._pool = server.pool
        self._slots = Slots(
            workload,
            server.limits.max_batch,
            runs_prompts=server.limits.prefill_chunk is not None,
            kv_tokens=server.limits.kv_tokens,
            pool=server.pool if server.policy.source is not None else None,
            rng=rng,
        )
        shape = self._slots.shape
        self._budgets = Budgets(shape) if self._policy.schedule.kind is ScheduleKind.ASYNC else None
        self._first_nodes = FirstNodes(shape) if self._policy.skips else None
        self._outcome = Outcome.empty(replicas)
        self._place = np.arange(replicas)  # of the replicas that are left, in the outcome

    def run(self, on_progress: Progress | None) -> Outcome:
        count = 0
        while True:
            over = self._slots.is_over
            if over.all():
                break
            if count % _CHECK_EVERY == 0:
                self._look(over, on_progress)
            count += 1
            new = self._slots.let_in()
            self._reset(new)
            self._round()
        return self._outcome

    def _look(self, over: BoolArray, on_progress: Progress | None) -> None:
        """Drop replicas that have ended, once they are many; report."""
        if on_progress is not None:
            total = len(self._outcome.seconds) * self._requests
            done = int(self._slots.next.sum()) + self._requests * (
                len(self._outcome.seconds) - len(self._place)
            )
            on_progress(done / total)
        if over.sum() * 4 < len(over):
            return
        self._place = self._place[~over]
        self._slots.keep(~over)
        for part in (self._budgets, self._first_nodes):
            if part is not None:
                part.keep(~over)

    def _reset(self, slots: BoolArray) -> None:
        if slots.any():
            for part in (self._budgets, self._first_nodes):
                if part is not None:
                    part.reset(slots)

    # -- a round ------------------------------------------------------------------------------

    def _round(self) -> None:
        slots = self._slots
        # A replica that is over idles along until it is dropped.
        running = slots.active & ~slots.is_over[:, None]
        prefilling = running & (slots.prefill > 0)
        decoding = running & ~prefilling & (slots.remaining > 0)
        chunk = self._chunks(prefilling)
        prompt = chunk.sum(axis=1)
        requests = decoding.sum(axis=1)
        total = np.where(decoding, slots.context, 0).sum(axis=1)
        context = np.where(requests > 0, total / np.maximum(requests, 1), 1.0)
        nodes, asked = self._decide(decoding, requests, prompt, context)
        rows = requests + nodes.sum(axis=1)
        costs, source = self._server.costs, self._policy.source
        seconds = costs.forward(rows, prompt, requests, context)
        seconds = np.where(rows + prompt > 0, seconds, 0.0)
        seconds += costs.rest.seconds(requests)
        if source is not None:
            seconds += costs.draft_seconds(source, asked.sum(axis=1))
        slots.clock += seconds
        self._commit(running, decoding, chunk, nodes, asked, seconds)

    def _chunks(self, prefilling: BoolArray) -> IntArray:
        """Prompt tokens of each slot in this round, int64 [M, C]."""
        left = np.where(prefilling, self._slots.prefill, 0)
        room = self._server.limits.prefill_chunk
        if room is None or not prefilling.any():
            return left
        before = np.cumsum(left, axis=1) - left
        return np.asarray(np.clip(room - before, 0, left), dtype=np.int64)

    def _decide(
        self, decoding: BoolArray, requests: IntArray, prompt: IntArray, context: FloatArray
    ) -> tuple[IntArray, BoolArray]:
        """Nodes to verify, int64 [M, C], and for whom the drafter was asked, bool [M, C]."""
        pool, policy = self._pool, self._policy
        nothing = np.zeros(self._slots.shape, dtype=np.int64)
        if pool is None or policy.source is None:
            return nothing, nothing > 0
        each = self._budget(pool, requests)
        caps = self._caps(pool, each)
        asked = decoding & (caps > 0)
        rates = value = None
        if policy.is_joint:
            rates = self._rates(requests, prompt, context, pool.width)
            value = requests.astype(np.float64)
            if self._first_nodes is not None:
                bar = bars(value, rates, each, stops=policy.stops)
                asked = self._first_nodes.pay(bar, asked)
        survival = pool.survival[self._slots.state]
        columns = np.arange(pool.width)
        survival[~asked[..., None] | (columns >= caps[..., None])] = ABSENT
        if rates is None or value is None:
            return admit_alone(policy.schedule, survival), asked
        has_offer = survival[..., 0] >= 0
        if self._first_nodes is not None:
            self._first_nodes.offered(survival[..., 0], has_offer)
        admitted = admit_jointly(survival, value, rates, stops=policy.stops)
        if self._budgets is None:
            return admitted, asked
        offered = (survival >= 0).sum(axis=2)
        by_budget = self._budgets.admit(offered)
        self._budgets.note(admitted, has_offer)
        return by_budget, asked

    def _budget(self, pool: Pool, requests: IntArray) -> IntArray:
        """Nodes that may be drafted for a request of each replica, int64 [M]."""
        most = self._server.limits.max_rows
        each = np.full(len(requests), pool.width)
        if most is not None:
            each = np.minimum(each, np.maximum(1, most // np.maximum(requests, 1) - 1))
        if self._policy.schedule.kind is ScheduleKind.FIXED:
            each = np.minimum(each, int(self._policy.schedule.value))
        return each

    def _caps(self, pool: Pool, each: IntArray) -> IntArray:
        """The same for every request, which may have little left to say; int64 [M, C]."""
        caps = np.broadcast_to(each[:, None], self._slots.shape)
        # The closing token comes on top of the path, so the last token needs no draft.
        room = self._slots.remaining - 1
        return np.minimum(caps, room) if pool.is_chain else np.where(room > 0, caps, 0)

    def _rates(
        self, requests: IntArray, prompt: IntArray, context: FloatArray, width: int
    ) -> FloatArray:
        """Rounds a second with 0, 1, ... nodes, float64 [M, C width + 1]."""
        costs, source = self._server.costs, self._policy.source or ""
        nodes = np.arange(self._slots.shape[1] * width + 1)
        rows = requests[:, None] + nodes
        seconds = costs.forward(rows, prompt[:, None], requests[:, None], context[:, None])
        extra = costs.rest.seconds(requests) + costs.draft_seconds(source, requests)
        return np.asarray(1.0 / (seconds + extra[:, None]), dtype=np.float64)

    def _commit(
        self,
        running: BoolArray,
        decoding: BoolArray,
        chunk: IntArray,
        nodes: IntArray,
        asked: BoolArray,
        seconds: FloatArray,
    ) -> None:
        slots, pool = self._slots, self._pool
        accepted = np.zeros(slots.shape, dtype=np.int64)
        if pool is not None and self._policy.source is not None:
            accepted = np.where(decoding, pool.gain[slots.state, nodes], 0)
            after = pool.following[slots.state, nodes]
            drawn = decoding & (after == NEW)
            after[drawn] = slots.fresh(int(drawn.sum()))
            slots.state = np.where(decoding, after, slots.state)
        committed = np.where(decoding, np.minimum(accepted + 1, slots.remaining), 0)
        accepted = np.minimum(accepted, committed)
        slots.prefill -= chunk
        first = (chunk > 0) & (slots.prefill == 0)
        slots.remaining -= committed + first
        slots.context += committed + first
        if first.any():
            slots.note_first(first)
        warm = slots.is_warm
        self._count(
            warm,
            {
                "seconds": seconds,
                "tokens": (committed + first).sum(axis=1),
                "committed": committed.sum(axis=1),
                "decode_seconds": seconds * decoding.sum(axis=1),
                "request_seconds": seconds * running.sum(axis=1),
                "rounds": (seconds > 0).astype(np.float64),
                "request_rounds": decoding.sum(axis=1),
                "drafted": (nodes > 0).sum(axis=1),
                "asked": asked.sum(axis=1),
                "nodes": nodes.sum(axis=1),
                "accepted": accepted.sum(axis=1),
                "prompt_tokens": chunk.sum(axis=1),
            },
        )
        slots.retire(self._outcome.finished)

    def _count(self, warm: BoolArray, figures: dict[str, FloatArray]) -> None:
        """Add what counts to the outcome."""
        for name, value in figures.items():
            getattr(self._outcome, name)[self._place] += np.where(warm, value, 0)
