"""One round: draft, one target forward for everybody, verify, commit.

Prefill chunks ride in the same forward as the rounds of requests that decode already.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dspark.active import ActiveRequest, Phase
from dspark.cache import Cache
from dspark.draft.base import DraftContext, Drafter, Observer
from dspark.errors import ConfigError, DsparkError, ShapeError
from dspark.payoff import StepClock
from dspark.request import TokenLogprob
from dspark.round_log import round_stats
from dspark.target import BatchPart, Target, TargetOutput, TokenBatch
from dspark.tree import Proposal
from dspark.tree_build import verify_part
from dspark.verify.verifier import Verdict, VerifyJob, verify

__all__ = ["RoundLimits", "RoundRunner"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundLimits:
    """Sizes of a round.

    Attributes:
        tree_budget: Nodes per request and round where the request does not say.
        depth: Longest drafted path where the request does not say.
        max_rows: Tree rows of a forward, over all requests; budgets shrink to fit.
        prefill_chunk: Prompt tokens of a forward, over all requests.
        keep_rounds: Keep a log of rounds in each request's statistics.
    """

    tree_budget: int = 15
    depth: int = 8
    max_rows: int = 64
    prefill_chunk: int = 512
    keep_rounds: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("tree_budget", 0),
            ("depth", 1),
            ("max_rows", 1),
            ("prefill_chunk", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value}, but must be >= {least}.")


@dataclass(slots=True)
class _Part:
    """What one request contributes to a forward."""

    request: ActiveRequest
    proposal: Proposal
    part: BatchPart
    is_prefill: bool
    ends_prefill: bool = False
    offered: int = 0
    needs_scrub: bool = False

    @property
    def wants_verdict(self) -> bool:
        return not self.is_prefill or self.ends_prefill


class RoundRunner:
    """Runs rounds over the active requests.

    Args:
        target: The target.
        cache: Its cache.
        drafter: The drafter.
        limits: Sizes.
    """

    def __init__(self, target: Target, cache: Cache, drafter: Drafter, limits: RoundLimits) -> None:
        self._target = target
        self._cache = cache
        self._drafter = drafter
        self._limits = limits
        self._eos = frozenset(target.info.eos_token_ids)
        self._drafter_failed = False
        self.clock = StepClock()

    def run(self, requests: Sequence[ActiveRequest]) -> None:
        """Run one forward over all requests and commit what it accepted.

        Args:
            requests: Requests in prefill or decoding, each with an open slot.
        """
        start = time.perf_counter()
        decoding = [r for r in requests if r.phase is Phase.DECODE]
        drafts = self._draft(decoding)
        drafted_at = time.perf_counter()
        parts = self._decode_parts(decoding, drafts) + self._prefill_parts(requests)
        parts = [part for part in parts if self._reserve(part)]
        if not parts:
            return
        batch = TokenBatch.build([part.part for part in parts])
        forward_at = time.perf_counter()
        capture = () if self._drafter_failed else self._drafter.capture
        output = self._target.forward(batch, self._cache, capture=capture)
        if output.logits.device.type != "cpu":
            torch.accelerator.synchronize(output.logits.device)
        forward_end = time.perf_counter()
        self._settle(parts, output)
        self._hand_over(requests)
        end = time.perf_counter()
        self._account(
            parts,
            draft=drafted_at - start,
            forward=forward_end - forward_at,
            rest=(forward_at - drafted_at) + (end - forward_end),
        )

    # -- drafting -----------------------------------------------------------------------------

    def _draft(self, decoding: Sequence[ActiveRequest]) -> dict[int, tuple[Proposal, int]]:
        """Trimmed proposals by request id, each with the number of nodes before trimming."""
        contexts = []
        for request in decoding:
            context = self._context(request, len(decoding))
            if context is not None:
                contexts.append(context)
        if not contexts:
            return {}
        try:
            proposals = self._drafter.propose(contexts)
            pairs = list(zip(contexts, proposals, strict=True))
            for context, proposal in pairs:
                _check_limits(context, proposal)
            return {
                c.request_id: (self._trim(c, p, len(decoding)), p.tree.num_nodes) for c, p in pairs
            }
        except Exception as exc:  # noqa: BLE001 - drafters are plug-ins: whatever breaks in one
            # must cost speed, never the answer.
            self._give_up(exc)
            return {}

    def _give_up(self, exc: Exception) -> None:
        if not self._drafter_failed:
            logger.warning("drafter %s failed, decoding plainly: %s", self._drafter.name, exc)
        self._drafter_failed = True

    def _context(self, request: ActiveRequest, count: int) -> DraftContext | None:
        params, limits = request.params, self._limits
        budget = limits.tree_budget if params.tree_budget is None else params.tree_budget
        if params.tree_budget is None:
            budget = min(budget, max(1, limits.max_rows // count - 1))
        most = self._target.exactness.max_nodes
        budget = budget if most is None else min(budget, most)
        # The closing token comes on top of the path, so the last remaining token needs no draft.
        room = request.remaining(self._target.info.max_positions) - 1
        depth = min(limits.depth if params.depth is None else params.depth, room, budget)
        wanted = params.draft and budget > 0 and depth > 0 and not self._drafter_failed
        measure_plain = request.switch.allowed and self.clock.wants_plain(count)
        if not wanted or measure_plain or not request.switch.is_on:
            request.switch.skipped()
            return None
        return _draft_context(request, request.tokens, budget=budget, depth=depth)

    def _trim(self, context: DraftContext, proposal: Proposal, count: int) -> Proposal:
        """Drop nodes whose expected tokens cost more time than plain steps of `count` requests."""
        tree = proposal.tree
        if tree.num_nodes == 0 or context.rule.draws_from_laws or not self.clock.is_known:
            return proposal
        if context.params.tree_budget is not None:
            return proposal
        plain = self.clock.seconds(count) / count
        keep = tree.survival * plain > self.clock.slope
        if keep.all():
            return proposal
        return proposal.subtree(keep)  # survival falls along paths, so this is ancestor-closed

    # -- the batch ----------------------------------------------------------------------------

    def _decode_parts(
        self, decoding: Sequence[ActiveRequest], drafts: dict[int, tuple[Proposal, int]]
    ) -> list[_Part]:
        parts = []
        for request in decoding:
            proposal, offered = drafts.get(request.request_id, (Proposal.empty(), 0))
            position = len(request.tokens) - 1
            part = verify_part(_slot(request), request.tokens[-1], position, proposal.tree)
            parts.append(_Part(request, proposal, part, is_prefill=False, offered=offered))
        return parts

    def _prefill_parts(self, requests: Sequence[ActiveRequest]) -> list[_Part]:
        room = self._limits.prefill_chunk
        parts = []
        for request in requests:
            if request.phase is not Phase.PREFILL or room <= 0:
                continue
            done = self._cache.length(_slot(request))
            chunk = request.prompt[done : done + room]
            ends = done + len(chunk) == len(request.prompt)
            part = BatchPart.chain(_slot(request), chunk, done, want_last=ends)
            parts.append(_Part(request, Proposal.empty(), part, is_prefill=True, ends_prefill=ends))
            room -= len(chunk)
        return parts

    def _reserve(self, part: _Part) -> bool:
        try:
            self._cache.reserve(_slot(part.request), len(part.part.token_ids))
        except DsparkError as exc:
            part.request.fail(exc.message, exc.hint)
            return False
        return True

    # -- after the forward --------------------------------------------------------------------

    def _settle(self, parts: Sequence[_Part], output: TargetOutput) -> None:
        judged = [part for part in parts if part.wants_verdict]
        starts = np.cumsum([0, *(len(part.part.output_rows) for part in judged)])
        jobs = [self._job(part, int(row)) for part, row in zip(judged, starts, strict=False)]
        verdicts = iter(self._verify(output.logits, jobs, judged))
        row = 0
        for part in parts:
            first_row, row = row, row + len(part.part.token_ids)
            if part.request.phase is Phase.DONE:  # its logits could not be used
                if part.wants_verdict:
                    next(verdicts)
                continue
            if not part.wants_verdict:
                self._commit(part, range(len(part.part.token_ids)), output, first_row)
                continue
            verdict = next(verdicts)
            if part.is_prefill:
                self._commit(part, range(len(part.part.token_ids)), output, first_row)
                part.request.phase = Phase.DECODE
            else:
                kept = [0, *(1 + node for node in verdict.path)]
                self._commit(part, kept, output, first_row)
            start = int(starts[judged.index(part)])
            self._append(part, verdict, output.logits, start)

    def _job(self, part: _Part, start: int) -> VerifyJob:
        request = part.request
        return VerifyJob(
            proposal=part.proposal,
            start=start,
            params=request.params,
            rule=request.rule,
            noise=request.noise,
            position=request.num_generated,
            # The prefill's draw is round 0, so that no noise is used twice.
            round=0 if part.is_prefill else request.rounds + 1,
            prompt=request.prompt,
            output=request.generated,
            bad_words=request.bad_words,
        )

    def _verify(
        self, logits: torch.Tensor, jobs: list[VerifyJob], judged: Sequence[_Part]
    ) -> list[Verdict]:
        try:
            return verify(logits, jobs)
        except DsparkError:
            pairs = zip(jobs, judged, strict=True)
            return [self._verify_alone(logits, job, part) for job, part in pairs]

    def _verify_alone(self, logits: torch.Tensor, job: VerifyJob, part: _Part) -> Verdict:
        """Judge one request by itself, so that its error does not reach the others."""
        try:
            return verify(logits, [job])[0]
        except DsparkError:
            pass
        try:
            # Perhaps only a drafted row is at fault, which plain decoding would never have run.
            verdict = verify(logits, [replace(job, proposal=Proposal.empty())])[0]
        except DsparkError as exc:
            part.request.fail(exc.message, exc.hint)
            return Verdict(path=(), closing=0)
        part.needs_scrub = True
        return verdict

    def _commit(
        self, part: _Part, kept: Sequence[int], output: TargetOutput, first_row: int
    ) -> None:
        self._cache.commit(_slot(part.request), kept)
        if part.needs_scrub:
            self._cache.scrub(_slot(part.request))
        if not part.request.params.draft:
            return  # nobody will ask for its hidden states
        for layer, hidden in output.hidden.items():
            rows = hidden[[first_row + row for row in kept]]
            part.request.features.setdefault(layer, []).append(rows)

    def _hand_over(self, requests: Sequence[ActiveRequest]) -> None:
        """Let the drafter take in hidden states that pile up: of a long prompt, or while it is off.

        Otherwise a prompt of a million tokens would keep the captured layers of all of them.
        """
        if self._drafter_failed or not isinstance(self._drafter, Observer):
            return
        contexts = []
        for request in requests:
            pending = sum(len(rows) for rows in next(iter(request.features.values()), []))
            if pending < self._limits.prefill_chunk or request.phase is Phase.DONE:
                continue
            known = request.tokens[: self._cache.length(_slot(request)) + 1]
            contexts.append(_draft_context(request, known, budget=1, depth=1))
        try:
            if contexts:
                self._drafter.observe(contexts)
        except Exception as exc:  # noqa: BLE001 - as in _draft
            self._give_up(exc)

    def _append(self, part: _Part, verdict: Verdict, logits: torch.Tensor, start: int) -> None:
        request, tree = part.request, part.proposal.tree
        tokens = [int(tree.token[node]) for node in verdict.path] + [verdict.closing]
        rows = [start, *(start + 1 + node for node in verdict.path)]
        before = request.num_generated
        for i, token in enumerate(tokens):
            if request.params.logprobs is not None:
                request.logprobs.append(_logprob(logits[rows[i]], token, request.params.logprobs))
            goes_on = request.append(
                token,
                is_drafted=i < len(verdict.path),
                eos=self._eos,
                max_positions=self._target.info.max_positions,
            )
            if not goes_on:
                break
        if not part.is_prefill:
            self._count(part, verdict, request.num_generated - before)

    # -- statistics ---------------------------------------------------------------------------

    def _count(self, part: _Part, verdict: Verdict, committed: int) -> None:
        request, tree, stats = part.request, part.proposal.tree, part.request.stats
        # Tokens cut off by an end token were accepted but never committed: they do not count.
        accepted = min(len(verdict.path), committed)
        request.rounds += 1
        stats.rounds += 1
        stats.proposed += part.offered
        stats.verified += tree.num_nodes
        stats.accepted += accepted
        stats.committed += committed
        for depth in range(tree.max_depth):
            if len(stats.verified_at_depth) <= depth:
                stats.verified_at_depth.append(0)
                stats.accepted_at_depth.append(0)
            stats.verified_at_depth[depth] += 1
            stats.accepted_at_depth[depth] += depth < accepted
        if self._limits.keep_rounds:
            entry = round_stats(
                tree, verdict, offered=part.offered, accepted=accepted, committed=committed
            )
            stats.round_log.append(entry)

    def _account(
        self, parts: Sequence[_Part], *, draft: float, forward: float, rest: float
    ) -> None:
        rows = sum(len(part.part.token_ids) for part in parts)
        decoding = [part for part in parts if not part.is_prefill]
        if len(decoding) == len(parts):
            self.clock.record(rows, forward)
        drafted = sum(part.offered > 0 for part in decoding)
        for part in parts:
            stats = part.request.stats
            share = forward * len(part.part.token_ids) / rows
            if part.is_prefill:
                stats.seconds_prefill += share
                continue
            stats.seconds_verify += share
            stats.seconds_draft += draft / len(decoding)
            stats.seconds_rest += rest / len(decoding)
            if part.offered and self.clock.is_known:
                nodes = part.proposal.tree.num_nodes
                extra = draft / drafted + self.clock.slope * nodes
                plain = self.clock.seconds(len(decoding)) / len(decoding)
                committed = stats.committed - part.request.committed_before
                part.request.switch.drafted(committed, extra, plain)
            part.request.committed_before = stats.committed


def _draft_context(
    request: ActiveRequest, tokens: Sequence[int], *, budget: int, depth: int
) -> DraftContext:
    """What the drafter is told of a request; the hidden states that waited for it go along."""
    features = {layer: torch.cat(rows) for layer, rows in request.features.items()}
    request.features.clear()
    return DraftContext(
        request_id=request.request_id,
        tokens=tokens,
        prompt_length=len(request.prompt),
        params=request.params,
        rule=request.rule,
        noise=request.noise,
        round=request.rounds + 1,
        budget=budget,
        depth=depth,
        width=request.params.width,
        features=features or None,
    )


def _check_limits(context: DraftContext, proposal: Proposal) -> None:
    tree = proposal.tree
    if tree.num_nodes > context.budget or tree.max_depth > context.depth:
        raise ShapeError(
            f"a proposal has {tree.num_nodes} nodes and depth {tree.max_depth}, but at most "
            f"{context.budget} and {context.depth} were asked for."
        )


def _slot(request: ActiveRequest) -> int:
    if request.slot is None:
        raise RuntimeError(f"request {request.request_id} takes part without a slot")
    return request.slot


def _logprob(logits: torch.Tensor, token: int, count: int) -> TokenLogprob:
    """Log-probability of a token from a row of raw logits [V], with `count` alternatives."""
    row = torch.log_softmax(logits.float(), dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        values, ids = row.topk(min(count, row.shape[0]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(row[token]), top)
