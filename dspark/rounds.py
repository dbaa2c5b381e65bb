"""One round: draft, schedule, one target forward for everybody, verify, commit.

Prefill chunks ride in the same forward as the rounds of requests that decode already.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeAlias

import torch

from dspark.active import ActiveRequest, Phase
from dspark.cache import Cache
from dspark.captured import parts_of
from dspark.draft.base import Drafter
from dspark.errors import DsparkError
from dspark.expert_reuse import ExpertCounter
from dspark.payoff import RoundCosts, StepSeconds
from dspark.request import TokenLogprob
from dspark.round_draft import NOTHING, Drafted, Drafting, slot_of
from dspark.round_drafter import GuardedDrafter
from dspark.round_limits import RoundLimits
from dspark.round_log import round_stats
from dspark.target import BatchPart, Target, TargetOutput, TokenBatch
from dspark.tree import Proposal
from dspark.tree_build import verify_part
from dspark.verify.sampling import has_history
from dspark.verify.scheduler import Scheduler
from dspark.verify.scheduler_drift import Outcome
from dspark.verify.scheduler_setting import Schedule
from dspark.verify.verifier import Verdict, VerifyJob, verify

__all__ = ["MakeRoom", "RoundLimits", "RoundRunner"]


MakeRoom: TypeAlias = Callable[[ActiveRequest, int], bool]
"""Reserves rows for a request; False if it takes no part in the round."""


@dataclass(eq=False, slots=True)
class _Part:
    """What one request contributes to a forward.

    Attributes:
        request: The request.
        part: Its rows.
        draft: The tree among them.
        is_prefill: It runs prompt tokens, or tokens again that it had to give up.
        ends_prefill: These are the last of them.
        wants_verdict: The rows yield tokens.
        gained: Tokens that it brought a request that decodes, but for those that were certain.
        needs_scrub: Rows of it are not finite.
    """

    request: ActiveRequest
    part: BatchPart
    draft: Drafted = NOTHING
    is_prefill: bool = False
    ends_prefill: bool = False
    wants_verdict: bool = True
    needs_scrub: bool = False
    gained: int = 0


class RoundRunner:
    """Runs rounds over the active requests.

    Args:
        target: The target.
        cache: Its cache.
        drafter: The drafter.
        limits: Sizes.
        schedule: How drafted nodes are admitted.
        step_seconds: What forwards cost, if that was measured beforehand.

    Attributes:
        experts: Those that forwards without prompt rows woke.
    """

    def __init__(
        self,
        target: Target,
        cache: Cache,
        drafter: Drafter,
        limits: RoundLimits,
        *,
        schedule: Schedule | None = None,
        step_seconds: StepSeconds | None = None,
    ) -> None:
        self._target = target
        self._cache = cache
        self._limits = limits
        self._eos = frozenset(target.info.eos_token_ids)
        self.experts = ExpertCounter(target)
        self._costs = RoundCosts(step_seconds)
        scheduler = Scheduler(schedule)
        self._drafter = GuardedDrafter(drafter)
        self._drafting = Drafting(target, cache, self._drafter, limits, scheduler, self._costs)

    def run(self, requests: Sequence[ActiveRequest], make_room: MakeRoom) -> int:
        """Run one forward over all requests and commit what it accepted.

        Args:
            requests: Requests in prefill or decoding, each with an open slot, in order.
            make_room: Reserves rows for a request; False if it takes no part in the round.

        Returns:
            Rows of the forward; 0 if there was none.
        """
        start = time.perf_counter()
        decoding, budgets, prefill = self._make_room(requests, make_room)
        forced = self._drafting.forced(decoding, budgets)
        rows = sum(len(part.part.token_ids) for part in prefill)
        load = self._drafting.load(decoding, rows, forced)
        propose_at = time.perf_counter()
        proposals = self._drafting.propose(decoding, budgets, forced, load)
        drafted_at = time.perf_counter()
        drafts = self._drafting.cut(decoding, proposals, forced, load)
        parts = self._decode_parts(decoding, drafts) + prefill
        if not parts:
            return 0
        batch = TokenBatch.build([part.part for part in parts])
        forward_at = time.perf_counter()
        with nullcontext() if prefill else self.experts.count():
            output = self._target.forward(batch, self._cache, capture=self._drafter.capture)
        if output.logits.device.type != "cpu":
            torch.accelerator.synchronize(output.logits.device)
        forward_end = time.perf_counter()
        self._settle(parts, output)
        self._drafting.finish([part.request for part in parts])
        end = time.perf_counter()
        draft, forward = drafted_at - propose_at, forward_end - forward_at
        self._account(parts, draft=draft, forward=forward, rest=end - start - draft - forward)
        return batch.num_rows

    @property
    def can_share(self) -> bool:
        """Whether requests may go on from what others began with."""
        return self._drafter.can_share

    def covered(self, tokens: Sequence[int]) -> int:
        """How many leading tokens of a text may come from others; see `GuardedDrafter.covered`."""
        return self._drafter.covered(tokens)

    def adopt(self, request_id: int, tokens: Sequence[int]) -> None:
        """Begin a request whose first tokens came from others; see `GuardedDrafter.adopt`."""
        self._drafter.adopt(request_id, tokens)

    def release(self, request_id: int) -> None:
        """Forget a request that is done; unknown ids are ignored."""
        self._drafting.release(request_id)

    def drop(self, request_id: int) -> None:
        """Forget what the drafter keeps of a request that will go on later."""
        self._drafting.drop(request_id)

    # -- the batch ----------------------------------------------------------------------------

    def _make_room(
        self, requests: Sequence[ActiveRequest], make_room: MakeRoom
    ) -> tuple[list[ActiveRequest], list[int], list[_Part]]:
        """Find out who takes part: requests that decode with their budgets, and prompt chunks.

        Room is made before anything is drafted, for all that may be drafted. A preemption that
        depended on drawn tokens would bend the law under rules that draw from laws.
        """
        decoding: list[ActiveRequest] = []
        budgets: list[int] = []
        prefill: list[_Part] = []
        count = sum(request.phase is Phase.DECODE for request in requests)
        room = self._limits.prefill_chunk
        for request in tuple(requests):  # those at its end may be sent away meanwhile
            if request.phase is Phase.DECODE:
                budget = self._drafting.budget(request, count)
                if make_room(request, budget + 1):
                    decoding.append(request)
                    budgets.append(budget)
            elif request.phase is Phase.PREFILL and room > 0:
                done = self._cache.length(slot_of(request))
                stop = min(done + room, _stop_of(request, done))
                if make_room(request, stop - done):
                    prefill.append(_prefill_part(request, done, stop))
                    room -= stop - done
        return decoding, budgets, prefill

    def _decode_parts(
        self, decoding: Sequence[ActiveRequest], drafts: dict[int, Drafted]
    ) -> list[_Part]:
        parts = []
        for request in decoding:
            draft = drafts.get(request.request_id, NOTHING)
            tokens, tree = request.tokens, draft.proposal.tree
            rows = verify_part(slot_of(request), tokens[-1], len(tokens) - 1, tree)
            parts.append(_Part(request, rows, draft))
        return parts

    # -- after the forward --------------------------------------------------------------------

    def _settle(self, parts: Sequence[_Part], output: TargetOutput) -> None:
        judged = [part for part in parts if part.wants_verdict]
        starts = [0, *accumulate(len(part.part.output_rows) for part in judged)]
        jobs = [self._job(part, row) for part, row in zip(judged, starts, strict=False)]
        verdicts = zip(self._verify(output, jobs, judged), starts, strict=False)
        row = 0
        captured: list[tuple[ActiveRequest, list[int]]] = []
        for part in parts:
            first_row, row = row, row + len(part.part.token_ids)
            request = part.request
            verdict, start = next(verdicts) if part.wants_verdict else (None, 0)
            if request.phase is Phase.DONE:  # its logits could not be used
                continue
            kept: Sequence[int] = range(len(part.part.token_ids))
            if verdict is not None and not part.is_prefill:
                kept = [0, *(1 + node for node in verdict.path)]
            self._commit(part, kept)
            if output.hidden and request.params.draft and kept:  # else nobody asks for these
                captured.append((request, [first_row + row for row in kept]))
            if part.ends_prefill:
                request.phase = Phase.DECODE
            if verdict is not None:
                self._append(part, verdict, output.logits, start)
        shares = parts_of(output.hidden, [rows for _, rows in captured])
        for (request, _), share in zip(captured, shares, strict=True):
            request.features.append(share)

    def _job(self, part: _Part, start: int) -> VerifyJob:
        request = part.request
        looks_back = has_history(request.params, request.bad_words)
        return VerifyJob(
            proposal=part.draft.proposal,
            start=start,
            params=request.params,
            rule=request.rule,
            noise=request.noise,
            position=request.num_generated,
            # The prefill's draw is round 0, so that no noise is used twice.
            round=0 if part.is_prefill else request.rounds + 1,
            prompt=request.prompt,
            output=request.generated if looks_back else (),
            bad_words=request.bad_words,
            allowed=None if request.masks is None else request.masks.allowed,
        )

    def _verify(
        self, output: TargetOutput, jobs: list[VerifyJob], judged: Sequence[_Part]
    ) -> list[Verdict]:
        logits = output.logits
        try:
            return verify(logits, jobs, output.tops)
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

    def _commit(self, part: _Part, kept: Sequence[int]) -> None:
        self._cache.commit(slot_of(part.request), kept)
        if part.needs_scrub:
            self._cache.scrub(slot_of(part.request))

    def _append(self, part: _Part, verdict: Verdict, logits: torch.Tensor, start: int) -> None:
        request, tree = part.request, part.draft.proposal.tree
        tokens = [int(tree.token[node]) for node in verdict.path] + [verdict.closing]
        count = request.params.logprobs
        before, most = request.num_generated, self._target.info.max_positions
        for i, token in enumerate(tokens):
            if count is not None:
                row = start if i == 0 else start + 1 + verdict.path[i - 1]
                request.logprobs.append(_logprob(logits[row], token, count))
            goes_on = request.append(
                token,
                is_drafted=i < len(verdict.path),
                eos=self._eos,
                max_positions=most,
            )
            if not goes_on:
                break
        if not part.is_prefill:
            self._count(part, verdict, request.num_generated - before)

    # -- statistics ---------------------------------------------------------------------------

    def _count(self, part: _Part, verdict: Verdict, committed: int) -> None:
        request, draft, stats = part.request, part.draft, part.request.stats
        tree = draft.proposal.tree
        # Tokens cut off by an end token were accepted but never committed: they do not count.
        accepted = min(len(verdict.path), committed)
        forced = min(draft.forced, accepted)
        part.gained = committed - forced
        request.rounds += 1
        if draft.offered:
            is_drawn = request.rule.draws_from_laws
            found = max(len(verdict.path) - draft.forced, 0)
            self._drafting.note(Outcome(request.request_id, is_drawn, draft.doubtful, found))
        stats.rounds += 1
        stats.proposed += draft.forced + draft.offered
        stats.verified += tree.num_nodes
        stats.accepted += accepted
        stats.forced += forced
        stats.committed += committed
        deepest = tree.max_depth
        if deepest > len(stats.verified_at_depth):
            more = [0] * (deepest - len(stats.verified_at_depth))
            stats.verified_at_depth += more
            stats.accepted_at_depth += more
        for depth in range(deepest):
            stats.verified_at_depth[depth] += 1
        for depth in range(min(accepted, deepest)):
            stats.accepted_at_depth[depth] += 1
        if self._limits.keep_rounds:
            entry = round_stats(draft, verdict, accepted=accepted, committed=committed)
            stats.round_log.append(entry)

    def _account(
        self, parts: Sequence[_Part], *, draft: float, forward: float, rest: float
    ) -> None:
        rows = sum(len(part.part.token_ids) for part in parts)
        decoding = [part for part in parts if not part.is_prefill]
        drafted = sum(part.draft.offered > 0 for part in decoding)
        if decoding and len(decoding) == len(parts):
            count, context = len(decoding), _mean_context(decoding)
            woken = self.experts.last
            self._costs.record(rows, forward, woken, requests=count, context=context)
            self._costs.record_overhead(draft, rest, drafted)
        for part in parts:
            stats = part.request.stats
            share = forward * len(part.part.token_ids) / rows
            if part.is_prefill:
                stats.seconds_prefill += share
                continue
            stats.seconds_verify += share
            stats.seconds_draft += draft / len(decoding)
            stats.seconds_rest += rest / len(decoding)
        if drafted and self._costs.is_known:
            self._weigh(decoding, draft / drafted)

    def _weigh(self, decoding: Sequence[_Part], draft: float) -> None:
        """Tell the switches of requests that drafted what they gained.

        Args:
            decoding: Requests that decode.
            draft: Seconds that drafting took for each of those that did.
        """
        count = len(decoding)
        certain = count + sum(part.draft.forced for part in decoding)
        nodes = sum(part.draft.doubtful.num_nodes for part in decoding)
        context = _mean_context(decoding)
        plain = self._costs.seen_once(certain, context, count)
        each = (self._costs.seen_once(certain + nodes, context, count) - plain) / max(nodes, 1)
        for part in decoding:
            if part.draft.offered:
                extra = draft + each * part.draft.doubtful.num_nodes
                part.request.switch.drafted(part.gained, extra, plain / count)


def _mean_context(decoding: Sequence[_Part]) -> int:
    return sum(len(part.request.tokens) for part in decoding) // len(decoding)


def _stop_of(request: ActiveRequest, done: int) -> int:
    """Where the prefill of a request that has run `done` tokens may go to in one forward."""
    last = len(request.prompt) - 1
    # Others that have the same prompt take over the state before its last token.
    return last if request.is_awaited and done < last else request.num_prefill


def _prefill_part(request: ActiveRequest, done: int, stop: int) -> _Part:
    """Tokens done .. stop - 1 of a request's prefill."""
    ends = stop == request.num_prefill
    wants = ends and request.num_generated == 0
    part = BatchPart.chain(slot_of(request), request.tokens[done:stop], done, want_last=wants)
    return _Part(
        request,
        part,
        is_prefill=True,
        ends_prefill=ends,
        wants_verdict=wants,
    )


def _logprob(logits: torch.Tensor, token: int, count: int) -> TokenLogprob:
    """Log-probability of a token from a row of raw logits [V], with `count` alternatives."""
    row = torch.log_softmax(logits.float(), dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        values, ids = row.topk(min(count, row.shape[0]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(row[token]), top)
