"""Which requests run: the queue, memory for those that leave it, and who gives way.

**Order.** A request stands at `round of submission - ageing * log2(priority)`; ties go by arrival.
Lower ones come first: in the queue, in the prompt tokens of a forward, and in memory. The place is
given once and for all, so it is first come, first served within a priority; and a request is
overtaken by those of twice its priority only if they come within `ageing` rounds after it. Nobody
starves, whatever arrives.

**Admission.** The queue is left in order: where the first one does not fit, nobody else goes in. A
request needs memory for its prompt and a few tokens, not for all it may come to say.

**Preemption.** Where memory runs out for a request that runs, the last one in order gives up its
slot, which may be that request itself. It keeps its tokens, goes back to its place in the queue and
is prefilled with them later. The noise of a token is named by its position and round, so nothing
of this shows in the text. The first in order is never preempted for another one, so there is always
one that gets on.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Sequence
from math import log2
from operator import attrgetter
from typing import Protocol

from dspark.active import ActiveRequest, Phase
from dspark.cache import Cache, CacheFullError
from dspark.engine_stats import EngineStats
from dspark.errors import DsparkError
from dspark.intake import Intake
from dspark.request import FinishReason

__all__ = ["Admission"]

_BY_ORDER = attrgetter("order")


class Rounds(Protocol):
    """What admission asks and tells whoever runs the rounds (`dspark.rounds.RoundRunner`)."""

    @property
    def can_share(self) -> bool:
        """Whether requests may go on from what others began with."""
        ...

    def covered(self, tokens: Sequence[int]) -> int:
        """How many leading tokens may come from others for all that a round needs of them."""
        ...

    def adopt(self, request_id: int, tokens: Sequence[int]) -> None:
        """A request begins, with tokens that came from others."""
        ...

    def release(self, request_id: int) -> None:
        """A request ended."""
        ...

    def drop(self, request_id: int) -> None:
        """A request was preempted, and will go on later."""
        ...


class Admission:
    """The unfinished requests of an engine.

    Args:
        cache: The target's cache.
        intake: Knows how much memory a request needs.
        max_batch: Requests that run at the same time at the most.
        ageing: See `dspark.engine_config.EngineConfig`.
        rounds: Whoever runs the rounds, and has to know who comes and goes.

    Attributes:
        active: Requests that run, in order.
        stats: What happened so far.
    """

    def __init__(
        self,
        cache: Cache,
        intake: Intake,
        *,
        max_batch: int,
        ageing: int,
        rounds: Rounds,
    ) -> None:
        self._cache = cache
        self._intake = intake
        self._max_batch = max_batch
        self._ageing = ageing
        self._rounds = rounds
        self._waiting: list[ActiveRequest] = []
        self._round = 0
        self._refused: tuple[int, int] | None = None  # the request that did not fit, pages then
        self.active: list[ActiveRequest] = []
        self.stats = EngineStats()

    @property
    def num_unfinished(self) -> int:
        """Requests waiting or running."""
        return len(self._waiting) + len(self.active)

    # -- in and out ---------------------------------------------------------------------------

    def add(self, request: ActiveRequest) -> None:
        """Take in a request; one that failed already is only counted."""
        self.stats.submitted += 1
        if request.phase is Phase.DONE:
            self._end(request)
            return
        place = self._round - self._ageing * log2(request.priority)
        request.order = (place, request.request_id)
        insort(self._waiting, request, key=_BY_ORDER)

    def cancel(self, request: ActiveRequest) -> None:
        """End a request wherever it stands; what it generated stays in its result."""
        if request.phase is Phase.DONE:
            return
        request.cancel()
        if request.slot is None:
            self._waiting.remove(request)
            self._stop_waiting(request)
            self._end(request)
        else:
            self.retire()

    def admit(self) -> None:
        """Begin a round: give slots to waiting requests, in order, while there is room."""
        self._round += 1
        place = 0
        while place < len(self._waiting) and len(self.active) < self._max_batch:
            request = self._waiting[place]
            if self._waits_for_prompt(request):
                place += 1
            elif self._open(request):
                del self._waiting[place]
            else:
                return

    def retire(self) -> bool:
        """Give back what finished requests hold; True if there were any."""
        done = [request for request in self.active if request.phase is Phase.DONE]
        if not done:
            return False
        self.active = [request for request in self.active if request.phase is not Phase.DONE]
        for request in done:
            self._close(request)
            self._rounds.release(request.request_id)
            self._end(request)
        return True

    def make_room(self, request: ActiveRequest, rows: int) -> bool:
        """Reserve rows for a request that runs; others may be preempted for it.

        Args:
            request: The request.
            rows: Rows of its next forward.

        Returns:
            False if it had to give way itself, or failed.
        """
        if request.slot is None:
            return False
        while True:
            try:
                self._cache.reserve(request.slot, rows)
                return True
            except CacheFullError as exc:
                if not self._make_way(request, exc):
                    return False
            except DsparkError as exc:
                request.fail(exc.message, exc.hint)
                return False

    # -- the queue ----------------------------------------------------------------------------

    def _sharable(self, request: ActiveRequest) -> list[int]:
        """The tokens of a request that may come from others, and one more."""
        tokens = request.tokens
        if not request.may_share:
            return []
        if not request.params.draft:  # nobody will read its hidden states
            return tokens
        return tokens[: self._rounds.covered(tokens[:-1]) + 1]

    def _waits_for_prompt(self, request: ActiveRequest) -> bool:
        """Whether a request waits for the prompt that another sample of it is running.

        That one stops before the last prompt token: then its state begins the others' prompts,
        and can be taken over by caches that share whole states only.
        """
        leader, size = request.leader, len(request.prompt)
        may_share = request.may_share and (self._rounds.can_share or not request.params.draft)
        if leader is None or size < 2 or not may_share:
            return False
        if leader.num_generated or request.num_generated:
            return False
        if leader.slot is None:
            return leader.phase is Phase.WAITING
        if self._cache.length(leader.slot) >= size - 1:
            return False
        leader.is_awaited = True
        return True

    def _open(self, request: ActiveRequest) -> bool:
        """Give a request its slot; False if the cache has no room for it yet."""
        if self.active and self._refused is not None:
            number, pages = self._refused
            if number == request.request_id and self._cache.usage().pages >= pages:
                return False  # nothing was given back: do not copy a shared prefix in vain
        error = self._try_open(request)
        if error is not None and self.active:
            self._refused = (request.request_id, self._cache.usage().pages)
            return False  # the others will give memory back
        if error is not None:
            # What it shares may hold more memory than it saves: start without.
            request.may_share = False
            self._cache.forget_kept()
            error = self._try_open(request)
        self._stop_waiting(request)
        if error is not None:
            request.fail(error.message, error.hint)
            self._end(request)
            return True
        self._note_opened(request)
        insort(self.active, request, key=_BY_ORDER)
        return True

    def _try_open(self, request: ActiveRequest) -> DsparkError | None:
        slot = None
        try:
            slot, shared = self._cache.open(self._sharable(request))
            self._cache.reserve(slot, self._intake.rows_to_begin(request) - shared)
        except DsparkError as exc:
            if slot is not None:
                self._cache.release(slot)
            return exc
        request.slot, request.shared = slot, shared
        if shared and request.params.draft:
            self._rounds.adopt(request.request_id, request.tokens[:shared])
        return None

    def _note_opened(self, request: ActiveRequest) -> None:
        self._refused = None
        request.phase = Phase.DECODE if request.shared == request.num_prefill else Phase.PREFILL
        stats = request.stats
        if stats.preemptions:
            again = max(0, request.lost - request.shared)
            stats.recomputed_tokens += again
            self.stats.recomputed_tokens += again
        else:
            stats.shared_prefix = request.shared

    # -- memory -------------------------------------------------------------------------------

    def _make_way(self, request: ActiveRequest, error: CacheFullError) -> bool:
        """Free memory; False if the request is not to try again."""
        if self.retire():
            return request.phase is not Phase.DONE
        last = self.active[-1]
        if last is not request:
            self._preempt(last)
            return True
        is_alone = len(self.active) == 1
        if is_alone and not request.shared:
            request.fail(error.message, error.hint)
            return False
        if is_alone:  # a shared page may belong to a run of pages that is larger than its share
            request.may_share = False
        self._preempt(request)
        if is_alone:
            self._cache.forget_kept()
        return False

    def _preempt(self, request: ActiveRequest) -> None:
        """Send a request back to the queue; its tokens are all that stays."""
        self.active.remove(request)
        if request.slot is not None:
            request.lost = self._cache.length(request.slot)
        self._close(request)
        self._rounds.drop(request.request_id)
        request.phase = Phase.WAITING
        request.waiting_since = time.perf_counter()
        request.stats.preemptions += 1
        self.stats.preemptions += 1
        insort(self._waiting, request, key=_BY_ORDER)

    def _close(self, request: ActiveRequest) -> None:
        if request.slot is not None:
            self._cache.release(request.slot)
        request.slot, request.shared, request.is_awaited = None, 0, False
        request.features.clear()
        self._refused = None

    def _stop_waiting(self, request: ActiveRequest) -> None:
        seconds = time.perf_counter() - request.waiting_since
        request.stats.seconds_waiting += seconds
        self.stats.seconds_waiting += seconds

    def _end(self, request: ActiveRequest) -> None:
        """Count a request that is done."""
        request.stats.seconds_total = time.perf_counter() - request.submitted_at
        if request.finish_reason is FinishReason.ERROR:
            self.stats.failed += 1
        elif request.finish_reason is FinishReason.CANCELLED:
            self.stats.cancelled += 1
        else:
            self.stats.finished += 1
