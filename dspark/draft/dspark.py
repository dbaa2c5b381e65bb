"""Drafter `dspark`: one forward of a block, then a tree from base logits plus a sequential head.

The backbone runs once a round, on [anchor, mask, mask, ...] of every request; what it gives for a
position, base logits U and a hidden state, is the same for all branches. So a level of the tree
costs one product with the sequential head's W2, and no forward.

**Context.** Every layer's keys and values of a committed position come from the target's hidden
states there, which arrive with the rounds (`DraftContext.features`); block_contexts.py keeps them.

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
from dspark.draft.block_contexts import BlockContexts
from dspark.draft.block_module import BlockModule
from dspark.draft.block_runner import BlockRunner, PlainRunner, Wanted
from dspark.draft.draft_cache import ContextCache
from dspark.draft.feed import WarnOnce, feed, history_of
from dspark.draft.grow import Growth, GrowthConfig, Limits, RankedGrowth, grow
from dspark.mtp_head import project
from dspark.tree import Proposal
from dspark.verify import sampling

__all__ = ["DSparkDrafter", "DSparkDrafterConfig"]


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


class _Job:
    """One request in one round."""

    __slots__ = (
        "cache",
        "context",
        "frontier",
        "growth",
        "history",
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
        start: [B, state size] of the sequential head before the anchor's first prediction; None
            without such a head, and where the runner grows the trees.
    """

    __slots__ = ("base", "hidden", "start")

    def __init__(self, hidden: Tensor, base: Tensor) -> None:
        self.hidden = hidden
        self.base = base
        self.start: Tensor | None = None


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
        self._contexts = BlockContexts(lambda: self.runner, self.capture, self._device)
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
        caches = self._contexts.bring(contexts)
        jobs: dict[int, _Job] = {}
        for place, (context, cache) in enumerate(zip(contexts, caches, strict=True)):
            if cache.length != len(context.tokens) - 1:
                self._warn("hidden states of the target are missing", "nothing is drafted.")
            elif context.budget > 0 and context.depth > 0:
                limits = self.config.limits(context, self._module.config.gamma)
                jobs[place] = _Job(context, cache, limits)
        if jobs:
            live = list(jobs.values())
            blocks = self._run(live)
            if self._grow(live):
                live = []
            else:
                anchors = [job.context.tokens[-1] for job in live]
                tokens = torch.tensor(anchors, device=self._device)
                blocks.start = self._start(blocks.hidden, tokens)
            while live := [job for job in live if job.advance()]:
                self._level(live, blocks)
        return [
            jobs[place].growth.proposal() if place in jobs else Proposal.empty()
            for place in range(len(contexts))
        ]

    @torch.inference_mode()
    def observe(self, contexts: Sequence[DraftContext]) -> None:
        """Keep hidden states until they are wanted; see `dspark.draft.base.Observer`."""
        self._contexts.observe(contexts)

    @property
    def shares_context(self) -> bool:
        """True: see `dspark.draft.base.SharesContext`."""
        return True

    @torch.inference_mode()
    def covered(self, tokens: Sequence[int]) -> int:
        """Leading tokens that others have run; see `dspark.draft.base.SharesContext`."""
        return self._contexts.covered(tokens)

    @torch.inference_mode()
    def adopt(self, request_id: int, tokens: Sequence[int]) -> None:
        """Begin a request with what others have of it; see `dspark.draft.base.SharesContext`."""
        self._contexts.adopt(request_id, tokens)

    def release(self, request_id: int) -> None:
        """Forget a request; unknown ids are ignored."""
        self._contexts.release(request_id)

    # -- block and tree -----------------------------------------------------------------------

    def _run(self, jobs: list[_Job]) -> _Blocks:
        """One forward over the blocks of all requests, and the base logits of all depths."""
        anchors = [job.context.tokens[-1] for job in jobs]
        depth = min(self._module.config.gamma, max(job.context.depth for job in jobs))
        hidden, base = self.runner.run(anchors, [job.cache for job in jobs], depth)
        for row, job in enumerate(jobs):
            job.row = row
        return _Blocks(hidden, base)

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
