"""Drafter `eagle3`: a one-layer draft that reads the target's hidden states.

A round has two parts. What the target has yielded since the last call becomes K/V of the draft, one
row for every committed token but the first, and the last of these rows, whose token is the anchor,
is run. Then the tree grows a level per forward over all requests; its nodes go on from
the draft's own features, and their K/V lie behind the committed columns just for the round: when
the target has judged them, rows made from its features take their place.

Columns are not positions: keys are rotated by position when they are written, so a row that was
never delivered (or is not finite) leaves a gap in what the draft sees and nothing else.

**Source:** EAGLE-3, arXiv 2503.01840; trees as in EAGLE-2, arXiv 2406.16858 (grow.py).

Letters: n rows, N rows of a request, E target width, D draft width, H query heads, d head size,
V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark.draft.base import DraftContext
from dspark.draft.eagle3_format import is_eagle3, load_eagle3
from dspark.draft.eagle3_module import Attend, Eagle3Module
from dspark.draft.eagle3_state import DraftState
from dspark.draft.feed import WarnOnce, feed, history_of
from dspark.draft.grow import Growth, GrowthConfig, grow
from dspark.errors import CapabilityError, ShapeError
from dspark.mtp_head import DraftVocab
from dspark.tree import Proposal

__all__ = ["Eagle3Drafter", "is_eagle3", "load_eagle3"]

_log = logging.getLogger(__name__)

_CHUNK = 512  # rows absorbed by a forward at the most: its input is several hidden states wide


@dataclass(eq=False, slots=True)
class _Backlog:
    """Committed rows of one request that the draft has not seen.

    Attributes:
        state: Where they go.
        tokens: Token of every row, the one after its feature's.
        start: Position of the first row's feature.
        hidden: The target's hidden states [N, E], in the order of `fc`'s input.
        last: Input [1, 2 D] and residual [1, D] of the last row, once known and finite.
    """

    state: DraftState
    tokens: list[int]
    start: int
    hidden: list[Tensor]
    last: tuple[Tensor, Tensor] | None = None


class _Job:
    """One request's tree in one round."""

    __slots__ = ("above", "context", "features", "frontier", "growth", "history", "row", "state")

    def __init__(
        self, context: DraftContext, state: DraftState, growth: Growth, first: Tensor
    ) -> None:
        self.context = context
        self.state = state
        self.growth = growth
        self.frontier: list[int] = []
        self.row = {-1: -1}  # node -> its column behind the committed ones
        self.above: dict[int, list[int]] = {-1: []}  # node -> columns of its path, its own too
        self.features = first  # [1 + nodes run, D], the anchor's first
        self.history = history_of(context)

    def advance(self) -> bool:
        """Choose the nodes to run next; False when the tree is done."""
        self.frontier = self.growth.frontier()
        for node in self.frontier:
            if node >= 0:
                column = len(self.row) - 1
                self.row[node] = column
                self.above[node] = [*self.above[self.growth.tree.parent[node]], column]
        return bool(self.frontier)

    @property
    def inputs(self) -> tuple[list[int], list[int], Tensor]:
        """Tokens, positions and features [N, D] of the frontier's rows."""
        tree = self.growth.tree
        tokens = [tree.token[node] for node in self.frontier]
        # A node of depth d is at position anchor + d, and its feature one before.
        first = len(self.context.tokens) - 2
        positions = [first + tree.depth[node] for node in self.frontier]
        rows = [1 + self.row[tree.parent[node]] for node in self.frontier]
        return tokens, positions, self.features[rows]

    def visible(self) -> Tensor:
        """Ancestors of the frontier's rows, and themselves: bool [N, nodes run]."""
        mask = np.zeros((len(self.frontier), len(self.row) - 1), dtype=bool)
        for i, node in enumerate(self.frontier):
            mask[i, self.above[node]] = True
        return torch.from_numpy(mask).to(self.features.device)


class Eagle3Drafter:
    """Drafts with an EAGLE-3 layer.

    Args:
        module: The network, in the dtype and on the device of the target.
        embed: Embedding of the target, int64 [n] -> [n, D]; needed where the draft has none.
        config: Settings.

    Attributes:
        config: Settings in force; may be replaced between rounds.
        weights: How the module's weights are packed (`dspark.registry.pack_draft`), "" where they
            are not.

    Raises:
        CapabilityError: If neither the draft nor the target has an embedding to offer.
    """

    def __init__(
        self,
        module: Eagle3Module,
        *,
        embed: Callable[[Tensor], Tensor] | None = None,
        config: GrowthConfig | None = None,
    ) -> None:
        if embed is None and not module.config.has_embedding:
            raise CapabilityError(
                "this EAGLE-3 draft has no embedding of its own, and the target does not lend its.",
                hint="use a draft whose checkpoint holds embed_tokens.weight",
            )
        self._module = module.eval()
        self.weights = ""
        self._lent_embed = None if module.config.has_embedding else embed
        self.config = config or GrowthConfig()
        self._capture = tuple(sorted(set(module.config.target_layers)))
        self._vocab = DraftVocab(module.config.vocab_size, module.target_ids())
        self._states: dict[int, DraftState] = {}
        self._warn = WarnOnce("eagle3")

    @property
    def module(self) -> Eagle3Module:
        """The network."""
        return self._module

    @property
    def name(self) -> str:
        """What reports call it."""
        return "eagle3"

    @property
    def capture(self) -> tuple[int, ...]:
        """Target layers whose outputs it reads."""
        return self._capture

    @torch.inference_mode()
    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        """Draft for several requests, one forward a level.

        A request gets an empty proposal where the target's hidden states or the draft's logits are
        not finite; a warning says so once.

        Args:
            contexts: One per request; `features` must reach up to the token before the anchor.

        Returns:
            One proposal each.

        Raises:
            ShapeError: If features do not fit the context, or a captured layer is missing.
        """
        self._run_anchors(self._absorb(contexts))
        jobs: dict[int, _Job] = {}
        for place, context in enumerate(contexts):
            job = self._start(context)
            if job is not None:
                jobs[place] = job
        live = [job for job in jobs.values() if job.advance()]
        for job in live:
            if job.state.logits is not None:
                self._feed(job, job.state.logits)
        while live := [job for job in live if job.advance()]:
            self._level(live)
        return [
            jobs[place].growth.proposal() if place in jobs else Proposal.empty()
            for place in range(len(contexts))
        ]

    @torch.inference_mode()
    def observe(self, contexts: Sequence[DraftContext]) -> None:
        """Take in the features of these contexts, and propose nothing.

        Args:
            contexts: As for `propose`.

        Raises:
            ShapeError: As for `propose`.
        """
        self._absorb(contexts)

    def release(self, request_id: int) -> None:
        """Forget a request; unknown ids are ignored."""
        self._states.pop(request_id, None)

    # -- committed rows -----------------------------------------------------------------------

    def _state(self, context: DraftContext) -> DraftState:
        """The request's state, a new one if its context was rewritten."""
        state = self._states.get(context.request_id)
        if state is None or not state.extends_to(context.tokens):
            shape = self._module.config
            state = DraftState(self._module.fc.weight, shape.num_kv_heads, shape.head_dim)
            self._states[context.request_id] = state
        return state

    def _backlog(self, context: DraftContext, state: DraftState) -> _Backlog | None:
        """What the context brings that the state has not got; notes the context as seen."""
        tokens, before = context.tokens, state.seen
        state.note(tokens)
        features = context.features or {}
        layers = self._module.config.target_layers
        missing = [layer for layer in layers if layer not in features]
        if missing:
            if features:
                raise ShapeError(f"the hidden states of target layer {missing[0]} are missing.")
            return None
        hidden = [features[layer] for layer in layers]
        start = len(tokens) - 1 - hidden[0].shape[0]
        if start < max(0, before - 1):
            raise ShapeError(
                f"{hidden[0].shape[0]} rows of hidden states came for {len(tokens) - before} new "
                "tokens of a context."
            )
        if not hidden[0].shape[0]:
            return None
        weight = self._module.fc.weight
        hidden = [rows.to(weight.device, weight.dtype) for rows in hidden]
        return _Backlog(state, list(tokens[start + 1 :]), start, hidden)

    def _absorb(self, contexts: Sequence[DraftContext]) -> list[_Backlog]:
        """Commit K/V of all rows that are new; returns them."""
        backlogs = []
        for context in contexts:
            backlog = self._backlog(context, self._state(context))
            if backlog is not None:
                backlogs.append(backlog)
        for chunk in _chunks(backlogs):
            self._absorb_chunk(chunk)
        return backlogs

    def _run_anchors(self, backlogs: Sequence[_Backlog]) -> None:
        """Run the last new row of every request, the one with its anchor, in one forward."""
        ready = [(b, *b.last) for b in backlogs if b.last is not None]
        if not ready:
            return
        x = torch.cat([row for _, row, _ in ready])
        residual = torch.cat([row for _, _, row in ready])
        positions = self._ids([b.start + len(b.tokens) - 1 for b, _, _ in ready])
        attend = self._attention([(b.state, 1, None) for b, _, _ in ready])
        hidden = self._module.decode(x, residual, positions, attend)
        logits, features = self._module.finish(hidden)
        for i, (backlog, _, _) in enumerate(ready):
            backlog.state.logits = logits[i : i + 1]
            backlog.state.feature = features[i : i + 1]

    def _absorb_chunk(self, chunk: Sequence[tuple[_Backlog, int, int]]) -> None:
        """Commit K/V of rows start .. stop - 1 of some backlogs."""
        module = self._module
        layers = range(len(chunk[0][0].hidden))
        hidden = [torch.cat([b.hidden[i][start:stop] for b, start, stop in chunk]) for i in layers]
        tokens = [token for b, start, stop in chunk for token in b.tokens[start:stop]]
        places = [b.start + row for b, start, stop in chunk for row in range(start, stop)]
        features = module.fuse(hidden)
        x, residual = module.enter(self._embed(tokens), features)
        keys, values = module.keys_values(x, self._ids(places))
        is_sound = x.isfinite().all(dim=1)
        all_sound = bool(is_sound.all())
        if not all_sound:
            self._warn(
                "hidden states of the target are not finite", "no tokens are drafted after them."
            )
        row = 0
        for backlog, start, stop in chunk:
            rows = slice(row, row + stop - start)
            row = rows.stop
            keep = slice(None) if all_sound else is_sound[rows]
            kept = keys[rows][keep]
            backlog.state.write(kept, values[rows][keep])
            backlog.state.length += kept.shape[0]
            if stop == len(backlog.tokens) and (all_sound or bool(is_sound[row - 1])):
                backlog.last = x[row - 1 : row], residual[row - 1 : row]

    # -- drafted rows -------------------------------------------------------------------------

    def _start(self, context: DraftContext) -> _Job | None:
        """The tree to grow for a request; None if it cannot be drafted for."""
        state = self._states[context.request_id]
        if state.feature is None or context.depth < 1 or context.budget < 1:
            return None
        limits = self.config.limits(context, context.depth)
        return _Job(context, state, grow(context, limits), state.feature)

    def _level(self, jobs: Sequence[_Job]) -> None:
        """Run the frontiers of all jobs in one forward and hand each its logits."""
        module = self._module
        parts = [job.inputs for job in jobs]
        tokens = [token for part in parts for token in part[0]]
        positions = self._ids([place for part in parts for place in part[1]])
        above = torch.cat([part[2] for part in parts])
        x, residual = module.enter(self._embed(tokens), above)
        keys, values = module.keys_values(x, positions)
        start = 0
        for job in jobs:
            rows = slice(start, start + len(job.frontier))
            job.state.write(keys[rows], values[rows], job.row[job.frontier[0]])
            start = rows.stop
        attend = self._attention([(job.state, len(job.frontier), job.visible()) for job in jobs])
        logits, features = module.finish(module.decode(x, residual, positions, attend))
        start = 0
        for job in jobs:
            rows = slice(start, start + len(job.frontier))
            job.features = torch.cat((job.features, features[rows]))
            self._feed(job, logits[rows])
            start = rows.stop

    def _attention(self, plan: Sequence[tuple[DraftState, int, Tensor | None]]) -> Attend:
        """Attention request by request: rows of one see only its own columns.

        Padding all contexts to one length would copy every K/V on every level, and make a row's
        sums depend on the longest context of the batch.
        """
        scale = self._module.scale

        def attend(queries: Tensor) -> Tensor:
            parts = (queries * scale).split([rows for _, rows, _ in plan])
            return torch.cat([s.attend(q, v) for (s, _, v), q in zip(plan, parts, strict=True)])

        return attend

    def _feed(self, job: _Job, logits: Tensor) -> None:
        """Hand the rows of one request's frontier to its tree."""
        rows, nodes = logits.float(), job.frontier
        feed(job.growth, job.context, job.history, nodes, rows, self._warn, vocab=self._vocab)

    # -- small things -------------------------------------------------------------------------

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        ids, weight = self._ids(tokens), self._module.fc.weight
        rows = self._module.embed(ids) if self._lent_embed is None else self._lent_embed(ids)
        return rows.to(weight.device, weight.dtype)

    def _ids(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._module.fc.weight.device)


def _chunks(backlogs: Sequence[_Backlog]) -> Iterator[list[tuple[_Backlog, int, int]]]:
    """Split rows of all backlogs into forwards: (backlog, first row, one past the last)."""
    chunk: list[tuple[_Backlog, int, int]] = []
    room = _CHUNK
    for backlog in backlogs:
        start = 0
        while start < len(backlog.tokens):
            stop = min(len(backlog.tokens), start + room)
            chunk.append((backlog, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield chunk
                chunk, room = [], _CHUNK
    if chunk:
        yield chunk
