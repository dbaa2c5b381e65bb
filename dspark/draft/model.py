"""Drafter `model`: a smaller causal language model with the target's vocabulary.

It has a cache of its own, one slot per request, which only ever holds a prefix of the request's
context: tokens before the anchor are run once and committed, nodes never are. Each level is one
forward over all requests, in which the nodes expanded so far ride along with the new ones; at the
size of a draft tree running them again costs less than a second notion of commitment.

Letters: R rows whose logits are asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dspark.cache import Cache
from dspark.draft.base import DraftContext
from dspark.draft.feed import WarnOnce, feed, history_of
from dspark.draft.grow import Growth, GrowthConfig, grow
from dspark.errors import CapabilityError, ConfigError
from dspark.target import BatchPart, Target, TokenBatch
from dspark.tree import Proposal

__all__ = ["ModelDrafter"]

_CHUNK = 512  # rows of a catch-up forward at the most
_RIDE = 64  # a backlog up to this many tokens rides along with the first level
_TAIL = 16  # tokens compared to see that a context still extends what was seen


class _Job:
    """One request in one round."""

    __slots__ = ("context", "frontier", "growth", "history", "index", "pending", "rows", "slot")

    def __init__(self, context: DraftContext, slot: int, committed: int, growth: Growth) -> None:
        self.context = context
        self.slot = slot
        self.pending = list(context.tokens[committed:])  # not in the cache; ends with the anchor
        self.growth = growth
        self.frontier: list[int] = []
        self.rows: list[int] = []  # nodes run so far, in row order after the anchor
        self.index = {-1: -1}  # node -> its row, counted from the anchor's at -1
        self.history = history_of(context)

    def advance(self) -> bool:
        """Choose the nodes to run next; False when the tree is done."""
        self.frontier = self.growth.frontier()
        for node in self.frontier:
            if node >= 0:
                self.index[node] = len(self.rows)
                self.rows.append(node)
        return bool(self.frontier)

    def part(self) -> BatchPart:
        """Rows of this level: the backlog with the anchor, then every node run so far."""
        tree, lead = self.growth.tree, len(self.pending)
        anchor = len(self.context.tokens) - 1
        tokens = self.pending + [tree.token[node] for node in self.rows]
        positions = list(range(anchor - lead + 1, anchor + 1))
        positions += [anchor + tree.depth[node] for node in self.rows]
        parents = list(range(-1, lead - 1))
        parents += [lead + self.index[tree.parent[node]] for node in self.rows]
        outputs = [lead + self.index[node] for node in self.frontier]
        return BatchPart(self.slot, tokens, positions, parents, outputs)


class ModelDrafter:
    """Drafts with a smaller model.

    Args:
        model: The draft, any target.
        vocab_size: V of the target that verifies.
        config: Settings.

    Attributes:
        config: Settings in force; may be replaced between rounds.

    Raises:
        ConfigError: If the vocabularies differ in size.
        CapabilityError: If the draft cannot run trees.
    """

    def __init__(
        self, model: Target, *, vocab_size: int, config: GrowthConfig | None = None
    ) -> None:
        info = model.info
        if info.vocab_size != vocab_size:
            raise ConfigError(
                f"draft {info.name} has a vocabulary of {info.vocab_size} tokens and the target "
                f"one of {vocab_size}, but they must be the same.",
                hint="choose a draft of the target's own family",
            )
        if not info.can_verify_trees:
            raise CapabilityError(f"{info.name} can only decode plainly, so it cannot draft.")
        self._model = model
        self.config = config or GrowthConfig()
        self._cache: Cache = model.new_cache()
        self._slots: dict[int, int] = {}
        self._tails: dict[int, tuple[int, list[int]]] = {}  # context length, its last tokens
        self._warn = WarnOnce(info.name)

    @property
    def name(self) -> str:
        """What reports call it."""
        return "model"

    @property
    def capture(self) -> tuple[int, ...]:
        """It needs no hidden states."""
        return ()

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        """Draft for several requests, one forward a level.

        A request gets an empty proposal where its context is longer than the draft can read, its
        cache is full, or the draft's logits are not finite; a warning says so once.

        Args:
            contexts: One per request.

        Returns:
            One proposal each.
        """
        jobs: dict[int, _Job] = {}
        for place, context in enumerate(contexts):
            job = self._start(context)
            if job is not None:
                jobs[place] = job
        self._catch_up(list(jobs.values()))
        live = list(jobs.values())
        while live := [job for job in live if job.advance()]:
            live = self._level(live)
        return [
            jobs[place].growth.proposal() if place in jobs else Proposal.empty()
            for place in range(len(contexts))
        ]

    def release(self, request_id: int) -> None:
        """Forget a request; unknown ids are ignored."""
        slot = self._slots.pop(request_id, None)
        self._tails.pop(request_id, None)
        if slot is not None:
            self._cache.release(slot)

    def _start(self, context: DraftContext) -> _Job | None:
        """Bring the request's slot in step with its context; None if it cannot be drafted for."""
        size = len(context.tokens)
        # The row of a node at depth d has position size - 1 + d; the last level is not run.
        depth = min(context.depth, self._model.info.max_positions - size + 1)
        if depth < 1 or context.budget < 1:
            return None
        seen, tail = self._tails.get(context.request_id, (0, []))
        if size < seen or list(context.tokens[seen - len(tail) : seen]) != tail:
            self.release(context.request_id)
        slot = self._slots.get(context.request_id)
        if slot is None:
            try:
                slot, _ = self._cache.open(context.tokens)
            except CapabilityError as error:
                self._warn("the draft's cache is full", error.message)
                return None
            self._slots[context.request_id] = slot
        self._tails[context.request_id] = (size, list(context.tokens[-_TAIL:]))
        limits = self.config.limits(context, depth)
        return _Job(context, slot, self._cache.length(slot), grow(context, limits))

    def _reserve(self, jobs: Iterable[_Job], rows: Mapping[int, int]) -> list[_Job]:
        """Make room for so many rows per slot; jobs that get none are left out."""
        roomy = []
        for job in jobs:
            try:
                self._cache.reserve(job.slot, rows[job.slot])
            except CapabilityError as error:
                self._warn("the draft's cache is full", error.message)
            else:
                roomy.append(job)
        return roomy

    def _catch_up(self, jobs: list[_Job]) -> None:
        """Run and commit long backlogs in chunks, several requests in one forward."""
        late = [job for job in jobs if len(job.pending) > _RIDE]
        while late:
            room, sizes = _CHUNK, {}
            for job in late:
                sizes[job.slot] = min(room, len(job.pending) - 1)
                room -= sizes[job.slot]
            now = [job for job in late if sizes[job.slot]]
            roomy = self._reserve(now, sizes)
            parts = [
                BatchPart.chain(
                    job.slot,
                    job.pending[: sizes[job.slot]],
                    len(job.context.tokens) - len(job.pending),
                    want_last=False,
                )
                for job in roomy
            ]
            if parts:
                self._model.forward(TokenBatch.build(parts), self._cache)
            for job in roomy:
                self._cache.commit(job.slot, range(sizes[job.slot]))
                del job.pending[: sizes[job.slot]]
            late = [
                job for job in late if len(job.pending) > _RIDE and (job in roomy or job not in now)
            ]

    def _level(self, jobs: list[_Job]) -> list[_Job]:
        """One forward; returns the jobs that can go on."""
        jobs = self._reserve(jobs, {job.slot: len(job.pending) + len(job.rows) for job in jobs})
        if not jobs:
            return []
        batch = TokenBatch.build([job.part() for job in jobs])
        logits = self._model.forward(batch, self._cache).logits
        for job in jobs:
            self._cache.commit(job.slot, range(len(job.pending) - 1))
            del job.pending[:-1]
        start = 0
        for job in jobs:
            stop = start + len(job.frontier)
            rows = logits[start:stop]
            feed(job.growth, job.context, job.history, job.frontier, rows, self._warn)
            start = stop
        return jobs
