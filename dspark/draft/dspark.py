"""Drafter `dspark`: one forward of a block, then a tree from base logits plus a sequential head.

The backbone runs once a round, on [anchor, mask, mask, ...] of every request; what it gives for a
position, base logits U and a hidden state, is the same for all branches. So a level of the tree
costs one product with the sequential head's W2, and no forward.

**Context.** Every layer's keys and values of a committed position come from the target's hidden
states there, which arrive with the rounds (`DraftContext.features`). They are kept per request and
never computed twice. Positions whose hidden states never arrive, because the target shared the
K/V of another request with the same beginning, are copied from that request's cache; if it is gone,
the draft sees the text from there on only.

**Source:** DSpark, arXiv 2607.05147; DFlash (no sequential head) for blocks whose anchor slot
predicts nothing.

Letters: B requests, S slots of a block, N rows, D hidden size, V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark.draft.base import DraftContext
from dspark.draft.block_module import BlockModule
from dspark.draft.block_runner import BlockRunner, NewRows, PlainRunner, Wanted
from dspark.draft.draft_cache import ContextCache, common_length
from dspark.draft.feed import WarnOnce, feed, history_of
from dspark.draft.grow import Growth, GrowthConfig, Limits, RankedGrowth, grow
from dspark.mtp_head import project
from dspark.tree import Proposal
from dspark.verify import sampling

__all__ = ["DSparkDrafter", "DSparkDrafterConfig"]

_MOST_WAITING = 64  # positions of a request whose hidden states wait to be taken in
_TAIL = 16  # tokens compared to see that a context still extends what was seen


@dataclass(frozen=True, slots=True, kw_only=True)
class DSparkDrafterConfig(GrowthConfig):
    """Settings of the drafter: those of `GrowthConfig` with another default.

    Attributes:
        beams: As there. Three rows are what a CPU multiplies for the price of one
            (benchmarks/draft_cost.py).

    Raises:
        ConfigError: If a value is outside its range.
    """

    beams: int = 3


@dataclass(frozen=True, slots=True, eq=False)
class _Arrival:
    """Hidden states that came for a request.

    Attributes:
        request_id: Whose.
        tokens: All tokens before the anchor.
        rows: [n, layers * Dt], hidden states of the last n of them; None for none.
    """

    request_id: int
    tokens: Sequence[int]
    rows: Tensor | None

    @property
    def start(self) -> int:
        """The first new position."""
        return len(self.tokens) - (0 if self.rows is None else int(self.rows.shape[0]))


class _Job:
    """One request in one round."""

    __slots__ = (
        "cache",
        "context",
        "frontier",
        "growth",
        "history",
        "is_sound",
        "needs_confidence",
        "ranked",
        "row",
        "states",
    )

    def __init__(self, context: DraftContext, cache: ContextCache, limits: Limits) -> None:
        self.context = context
        self.cache = cache
        self.growth: Growth = grow(context, limits)
        self.needs_confidence = limits.needs_confidence
        self.history = history_of(context)
        self.ranked: RankedGrowth | None = None  # where nothing but a temperature shapes logits
        if isinstance(self.growth, RankedGrowth) and context.allowed is None:
            self.ranked = self.growth if sampling.only_scales(context.params) else None
        self.frontier: list[int] = []
        self.is_sound = True
        self.row = 0  # among the round's blocks
        self.states: dict[int, Tensor] = {}  # parent -> state of the head after the parent's token

    def advance(self) -> bool:
        """Choose the nodes to expand next; False when the tree is done."""
        self.frontier = self.growth.frontier()
        return bool(self.frontier)

    def last_token(self, node: int) -> int:
        """Token that a node's children follow."""
        return self.context.tokens[-1] if node < 0 else self.growth.tree.token[node]

    def depth(self, node: int) -> int:
        """Depth of a node, 0 for the anchor."""
        return 0 if node < 0 else self.growth.tree.depth[node]


class _Blocks:
    """What the backbone gave for this round.

    Attributes:
        hidden: [B, S, D].
        base: float32 [B, depths, Vd], base logits of depth 1, 2, ...
        start: [B, state size] of the sequential head before the anchor's first prediction.
    """

    __slots__ = ("base", "hidden", "start")

    def __init__(self, hidden: Tensor, base: Tensor, start: Tensor | None) -> None:
        self.hidden = hidden
        self.base = base
        self.start = start


class DSparkDrafter:
    """Drafts with a DSpark or DFlash module.

    Args:
        module: The module, in eval mode.
        config: Settings.
        name: What reports call it.

    Attributes:
        config: Settings in force; may be replaced between rounds.
        weights: How the module's weights are packed (`dspark.registry.pack_draft`), "" where they
            are not.
    """

    def __init__(
        self,
        module: BlockModule,
        *,
        config: DSparkDrafterConfig | None = None,
        name: str = "dspark",
    ) -> None:
        self._module = module
        self.config = config or DSparkDrafterConfig()
        self.weights = ""
        self._name = name
        self._device = module.device
        self._vocab = module.vocab.to(self._device)
        self._plain = PlainRunner(module)
        head = module.markov_head
        self._reads_hidden = head is not None and head.reads_hidden
        self._caches: dict[int, ContextCache] = {}
        self._waiting: dict[int, _Arrival] = {}
        self._warn = WarnOnce(name)

    @property
    def module(self) -> BlockModule:
        """The module."""
        return self._module

    @property
    def runner(self) -> BlockRunner:
        """What runs the module: what a loader gave it, else its own layers."""
        given: BlockRunner | None = getattr(self._module, "runner", None)
        return given or self._plain

    @property
    def name(self) -> str:
        """What reports call it."""
        return self._name

    @property
    def capture(self) -> tuple[int, ...]:
        """Target layers whose hidden states it needs."""
        return self._module.config.target_layer_ids

    @property
    def confidence_depth(self) -> int:
        """Tokens of a block that its confidence head rates, 0 without such a head."""
        has_head = getattr(self._module, "confidence_head", None) is not None
        return self._module.config.gamma if has_head else 0

    @torch.inference_mode()
    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        """Draft for several requests with one forward of the backbone.

        A request gets an empty proposal where the hidden states of its newest positions are
        missing or the module's output is not finite; a warning says so once.

        Args:
            contexts: One per request.

        Returns:
            One proposal each.
        """
        self._follow([self._arrived(context) for context in contexts])
        jobs: dict[int, _Job] = {}
        for place, context in enumerate(contexts):
            cache = self._caches[context.request_id]
            if cache.length != len(context.tokens) - 1:
                self._warn("hidden states of the target are missing", "nothing is drafted.")
            elif context.budget > 0 and context.depth > 0:
                limits = self.config.limits(context, self._module.config.gamma)
                jobs[place] = _Job(context, cache, limits)
        if jobs:
            blocks = self._run(list(jobs.values()))
            live = [job for job in jobs.values() if job.is_sound]
            if self._grow(live):
                live = []
            while live := [job for job in live if job.advance()]:
                self._level(live, blocks)
        return [
            jobs[place].growth.proposal() if place in jobs else Proposal.empty()
            for place in range(len(contexts))
        ]

    @torch.inference_mode()
    def observe(self, contexts: Sequence[DraftContext]) -> None:
        """Keep hidden states until there is something to draft; see `dspark.draft.base.Observer`.

        A few rows cost as much to take in as many, so rounds without drafts leave it to the next
        one that has some, or to the round in which `_MOST_WAITING` would be exceeded. Rows behind a
        gap do not wait: what fills it may be gone by then.
        """
        many = []
        for context in contexts:
            new = self._arrived(context)
            is_few = new.rows is not None and new.rows.shape[0] < _MOST_WAITING
            if is_few and self._aligned(new).length == new.start:
                self._waiting[context.request_id] = new
            else:
                many.append(new)
        self._follow(many)

    def release(self, request_id: int) -> None:
        """Forget a request; unknown ids are ignored."""
        self._caches.pop(request_id, None)
        self._waiting.pop(request_id, None)

    # -- context ------------------------------------------------------------------------------

    def _follow(self, arrivals: Sequence[_Arrival]) -> None:
        """Bring every request's cache in step with its context."""
        ready: list[NewRows] = []
        lacking: list[NewRows] = []
        for new in arrivals:
            cache = self._aligned(new)
            if new.rows is not None:
                place = ready if cache.length == new.start else lacking
                place.append((cache, new.tokens, new.rows))
        if ready:
            self.runner.take(ready)
        for cache, tokens, features in lacking:  # a donor may be among the ready ones
            self._bridge(cache, tokens[: len(tokens) - features.shape[0]])
            self.runner.take([(cache, tokens, features)])

    def _arrived(self, context: DraftContext) -> _Arrival:
        """What a context brings, behind what waits of its request."""
        size = len(context.tokens) - 1
        rows = self._features(context, size)
        waiting = self._waiting.pop(context.request_id, None)
        if waiting is not None and waiting.rows is not None:
            start = size - (0 if rows is None else int(rows.shape[0]))
            if len(waiting.tokens) == start:
                rows = waiting.rows if rows is None else torch.cat([waiting.rows, rows])
            else:  # positions come again, or some are missing
                self._follow([waiting])
        return _Arrival(context.request_id, context.tokens[:size], rows)

    def _features(self, context: DraftContext, size: int) -> Tensor | None:
        """Captured hidden states side by side, [n, layers * Dt]; of the last `size` positions."""
        given = context.features
        if not given or size == 0 or any(layer not in given for layer in self.capture):
            return None
        joined = torch.cat([given[layer].to(self._device) for layer in self.capture], dim=-1)
        return joined[-size:] if joined.shape[0] else None

    def _aligned(self, new: _Arrival) -> ContextCache:
        """The request's cache, holding nothing from the first new position on."""
        cache = self._caches.get(new.request_id)
        if cache is not None:
            seen = min(cache.length, len(new.tokens))
            tail = slice(max(0, seen - _TAIL), seen)
            if cache.tokens[tail] != list(new.tokens[tail]):
                cache = None
        if cache is None:
            cache = self.runner.new_cache()
        # A recomputed request brings positions again that the cache holds already.
        cache.truncate(new.start)
        self._caches[new.request_id] = cache
        return cache

    def _bridge(self, cache: ContextCache, tokens: Sequence[int]) -> None:
        """Fill positions that no hidden states came for."""
        sharing = [
            request_id
            for request_id, waiting in self._waiting.items()
            if common_length(waiting.tokens, tokens) > waiting.start
        ]
        if sharing:  # they continue their caches, so this comes to no gap
            self._follow([self._waiting.pop(request_id) for request_id in sharing])
        donors = list(self._caches.values())
        shared = [(common_length(donor.tokens, tokens), i) for i, donor in enumerate(donors)]
        longest, index = max(shared, default=(0, 0))
        if longest > cache.length:
            cache.borrow(donors[index], longest)
        if cache.length < len(tokens):
            cache.skip(tokens[cache.length :])

    # -- block and tree -----------------------------------------------------------------------

    def _run(self, jobs: list[_Job]) -> _Blocks:
        """One forward over the blocks of all requests, and the base logits of all depths."""
        anchors = [job.context.tokens[-1] for job in jobs]
        depth = min(self._module.config.gamma, max(job.context.depth for job in jobs))
        hidden, base = self.runner.run(anchors, [job.cache for job in jobs], depth)
        for row, (job, top) in enumerate(zip(jobs, base.amax(dim=(1, 2)).tolist(), strict=True)):
            job.row = row
            job.is_sound = top - top == 0  # false for NaN and infinities
            if not job.is_sound:
                self._warn("the draft's output is not finite", "nothing is drafted.")
        tokens = torch.tensor(anchors, device=self._device)
        return _Blocks(hidden, base, self._start(hidden, tokens))

    def _start(self, hidden: Tensor, anchors: Tensor) -> Tensor | None:
        """States [B, S] of the sequential head where the first prediction begins."""
        head = self._module.markov_head
        if head is None:
            return None
        state = head.start(hidden[:, 0])
        if self._module.config.first_slot:  # trained through the anchor's slot as well
            _, state = head.latent(state, head.embed(anchors), hidden[:, 0])
        return state

    def _grow(self, jobs: Sequence[_Job]) -> bool:
        """Let the runner grow the trees; False if it does not grow them all."""
        asks = []
        for job in jobs:
            ask = None
            if job.ranked is not None:
                scale = sampling.scale_of(job.context.params)
                ask = job.ranked.ask(job.row, scale, self._vocab.size)
            if ask is None:
                return False
            asks.append(ask)
        trees = self.runner.grow(asks) if asks else None
        for job, tree in zip(jobs, trees or (), strict=False):
            if job.ranked is not None:
                job.ranked.take_tree(tree)
        return trees is not None

    def _level(self, jobs: list[_Job], blocks: _Blocks) -> None:
        """Expand the frontiers of all requests at once."""
        which = [(job, node) for job in jobs for node in job.frontier]
        rows = [job.row for job, _ in which]
        depths = [job.depth(node) for job, node in which]
        tokens = torch.tensor([job.last_token(n) for job, n in which], device=self._device)
        wants_confidence = any(job.needs_confidence for job in jobs)
        hidden = blocks.hidden[:0, 0]
        if self._reads_hidden or wants_confidence:
            first = self._module.config.first_slot
            hidden = blocks.hidden[rows, [first + depth for depth in depths]]
        latent = self._latent(which, blocks, tokens, hidden)
        sure = None
        if wants_confidence:
            found = self._module.confidence(hidden, tokens)
            sure = None if found is None else found.tolist()
        if self._find(which, latent, sure):
            return
        logits = blocks.base[rows, depths]
        if latent is not None and self._module.markov_head is not None:
            logits = logits + project(latent, self._module.markov_head.markov_w2)
        start = 0
        for job in jobs:
            part = slice(start, start + len(job.frontier))
            own = None if sure is None else sure[part]
            feed(
                job.growth,
                job.context,
                job.history,
                job.frontier,
                logits[part],
                self._warn,
                own,
                vocab=self._vocab,
            )
            start = part.stop

    def _latent(
        self,
        which: list[tuple[_Job, int]],
        blocks: _Blocks,
        tokens: Tensor,
        hidden: Tensor,
    ) -> Tensor | None:
        """What the sequential head's second matrix is applied to, [R, K]; keeps its states."""
        head = self._module.markov_head
        if head is None or blocks.start is None:
            return None
        states = blocks.start[:0]
        if head.state_size:
            states = torch.stack([_state_before(job, n, blocks.start) for job, n in which])
        latent, after = head.latent(states, head.embed(tokens), hidden)
        if head.state_size:
            for (job, node), state in zip(which, after, strict=True):
                job.states[node] = state
        return latent

    def _find(
        self, which: list[tuple[_Job, int]], latent: Tensor | None, sure: list[float] | None
    ) -> bool:
        """Let the runner look for the candidates; False if it does not."""
        wanted = []
        for job, node in which:
            if job.ranked is None:
                return False
            noise = job.ranked.noise(node, self._vocab.size)
            scale = sampling.scale_of(job.context.params)
            wanted.append(Wanted(job.depth(node), job.row, job.ranked.count, scale, noise))
        found = self.runner.find(wanted, latent)
        if found is None or not np.isfinite(found.log_sum).all():
            return False
        start = 0
        while start < len(which):
            job = which[start][0]
            stop = start + len(job.frontier)
            if job.ranked is not None:
                own = None if sure is None else sure[start:stop]
                job.ranked.take_found(job.frontier, found.rows(start, stop), own)
            start = stop
        return True


def _state_before(job: _Job, node: int, start: Tensor) -> Tensor:
    """State of the head before a node's own token: what its parent's expansion left."""
    return start[job.row] if node < 0 else job.states[job.growth.tree.parent[node]]
