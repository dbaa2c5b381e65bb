"""Drafter `mtp`: V4's MTP-1 module, one forward of one block per level of the tree.

Its cache holds a row per pair (X_t, x_{t+1}) of the target's streams and the token after them.
Pairs of committed tokens are run once, with the target's own streams, and committed. Rows of
drafted tokens are made from the module's own streams and never committed: they ride along with the
next level's rows, as in draft/model.py. Only relative positions matter to a window layer, so a
request whose hidden states did not arrive from the start on simply begins later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.base_model.mtp import MTPModule
from dspark.draft.base import DraftContext
from dspark.draft.feed import WarnOnce, feed, history_of
from dspark.draft.grow import Growth, GrowthConfig, grow
from dspark.target import BatchPart, TokenBatch
from dspark.tree import Proposal

__all__ = ["MTPDrafter"]

_CHUNK = 512
"""Pairs of a request that are run at once."""


@dataclass(slots=True)
class _Track:
    """Where a request stands: its slot, and the position whose streams come next."""

    slot: int
    next_position: int


class _Job:
    """One request in one round."""

    def __init__(self, context: DraftContext, track: _Track, growth: Growth) -> None:
        self.context = context
        self.track = track
        self.growth = growth
        self.history = history_of(context)
        self.frontier: list[int] = []
        self.rows: list[int] = []  # nodes run so far
        self.inputs: dict[int, Tensor] = {}  # node -> streams it is joined with, [N, D]
        self.outputs: dict[int, Tensor] = {}  # node, -1 for the anchor -> output streams [N, D]

    def advance(self) -> bool:
        """Choose the nodes to run next; False when the tree is done."""
        self.frontier = self.growth.frontier()
        for node in self.frontier:
            self.rows.append(node)
            self.inputs[node] = self.outputs[self.growth.tree.parent[node]]
        return bool(self.frontier)

    def part(self, length: int) -> BatchPart:
        """All rows of the tree so far behind `length` committed pairs."""
        tree, place = self.growth.tree, {node: i for i, node in enumerate(self.rows)}
        return BatchPart(
            self.track.slot,
            [tree.token[node] for node in self.rows],
            [length - 1 + tree.depth[node] for node in self.rows],
            [place.get(tree.parent[node], -1) for node in self.rows],
            [],
        )


class MTPDrafter:
    """Drafts with the MTP-1 module of the target's own checkpoint.

    Args:
        module: The module.
        streams_layer: What to capture of the target: all streams behind its last layer.
        config: Settings; by default unlikely nodes are expanded less than by other drafters, since
            the module was trained for one step ahead.

    Attributes:
        config: Settings in force; may be replaced between rounds.
    """

    def __init__(
        self, module: MTPModule, *, streams_layer: int, config: GrowthConfig | None = None
    ) -> None:
        self._module = module
        self._layer = streams_layer
        self.config = config or GrowthConfig(min_survival=0.05)
        self._cache = module.new_cache()
        self._tracks: dict[int, _Track] = {}
        self._warn = WarnOnce("mtp")

    @property
    def name(self) -> str:
        """What reports call it."""
        return "mtp"

    @property
    def capture(self) -> tuple[int, ...]:
        """Target layers whose hidden states it needs."""
        return (self._layer,)

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        """Draft for several requests, one forward a level.

        Args:
            contexts: One per request.

        Returns:
            One proposal each; empty where hidden states are missing or not finite.
        """
        last = self._follow(contexts)
        jobs: dict[int, _Job] = {}
        for place, context in enumerate(contexts):
            output = last.get(context.request_id)
            if output is None:
                self._warn("hidden states of the target are missing", "nothing is drafted.")
            elif context.budget > 0 and context.depth > 0:
                track = self._tracks[context.request_id]
                job = _Job(
                    context, track, grow(context, self.config.limits(context, context.depth))
                )
                job.outputs[-1] = output
                jobs[place] = job
        live = [job for job in jobs.values() if job.growth.frontier()]
        if live:
            tops = self._module.logits(torch.stack([job.outputs[-1] for job in live]))
            for job, row in zip(live, tops, strict=True):
                feed(job.growth, job.context, job.history, [-1], row[None], self._warn)
        while live := [job for job in live if job.advance()]:
            self._level(live)
        return [
            jobs[place].growth.proposal() if place in jobs else Proposal.empty()
            for place in range(len(contexts))
        ]

    def observe(self, contexts: Sequence[DraftContext]) -> None:
        """Take in hidden states without drafting; see `dspark.draft.base.Observer`."""
        self._follow(contexts)

    def release(self, request_id: int) -> None:
        """Forget a request; unknown ids are ignored."""
        track = self._tracks.pop(request_id, None)
        if track is not None:
            self._cache.release(track.slot)
            self._cache.forget_kept()  # nothing of it could be shared

    def _follow(self, contexts: Sequence[DraftContext]) -> dict[int, Tensor]:
        """Run and commit all new pairs; output streams [N, D] of every request's newest pair."""
        waiting: dict[int, tuple[_Track, Sequence[int], Tensor]] = {}
        for context in contexts:
            flat = (context.features or {}).get(self._layer)
            anchor = len(context.tokens) - 1
            if flat is None or flat.shape[0] == 0 or anchor < 1:
                continue
            streams = self._module.split(flat[-anchor:])
            first = anchor - streams.shape[0]
            track = self._tracks.get(context.request_id)
            if track is None or track.next_position != first:
                self.release(context.request_id)
                slot, _ = self._cache.open([])
                track = self._tracks[context.request_id] = _Track(slot, first)
            waiting[context.request_id] = (track, context.tokens[first + 1 :], streams)
        newest: dict[int, Tensor] = {}
        while waiting:
            parts = {
                key: (track, tokens[:_CHUNK], streams[:_CHUNK])
                for key, (track, tokens, streams) in waiting.items()
            }
            newest.update(self._run_pairs(parts))
            waiting = {
                key: (track, tokens[_CHUNK:], streams[_CHUNK:])
                for key, (track, tokens, streams) in waiting.items()
                if len(tokens) > _CHUNK
            }
        return newest

    def _run_pairs(
        self, parts: dict[int, tuple[_Track, Sequence[int], Tensor]]
    ) -> dict[int, Tensor]:
        rows = []
        for track, tokens, _ in parts.values():
            self._cache.reserve(track.slot, len(tokens))
            start = self._cache.length(track.slot)
            rows.append(BatchPart.chain(track.slot, tokens, start, want_last=False))
        streams = torch.cat([part[2] for part in parts.values()])
        out = self._module.forward(TokenBatch.build(rows), streams, self._cache)
        newest, stop = {}, 0
        for key, (track, tokens, _) in parts.items():
            stop += len(tokens)
            newest[key] = out[stop - 1]
            self._cache.commit(track.slot, range(len(tokens)))
            track.next_position += len(tokens)
        return newest

    def _level(self, jobs: Sequence[_Job]) -> None:
        """One forward over the trees of all requests; expands their frontiers."""
        parts = []
        for job in jobs:
            self._cache.reserve(job.track.slot, len(job.rows))
            parts.append(job.part(self._cache.length(job.track.slot)))
        streams = torch.stack([job.inputs[node] for job in jobs for node in job.rows])
        out = self._module.forward(TokenBatch.build(parts), streams, self._cache)
        start, wanted = 0, []
        for job in jobs:
            new = start + len(job.rows) - len(job.frontier)
            start += len(job.rows)
            wanted.append(out[new:start])
            job.outputs.update(zip(job.frontier, out[new:start], strict=True))
        logits = self._module.logits(torch.cat(wanted))
        start = 0
        for job in jobs:
            rows = logits[start : start + len(job.frontier)]
            start += len(job.frontier)
            feed(job.growth, job.context, job.history, job.frontier, rows, self._warn)
