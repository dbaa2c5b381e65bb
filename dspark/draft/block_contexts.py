"""What a module that predicts blocks keeps of the contexts of its requests.

Keys and values of a committed position come from the target's hidden states there. They are kept
per request and never computed twice. A position whose hidden states never arrive, because the
target took over the K/V of another request with the same beginning, is copied from that request's
cache; requests that ended are kept for it as long as a target keeps theirs. Where nobody has it,
the draft sees the text from there on only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.captured import rows_of, side_by_side
from dspark.draft.base import DraftContext
from dspark.draft.block_runner import BlockRunner, NewRows
from dspark.draft.draft_cache import ContextCache, common_length

__all__ = ["BlockContexts"]

_MOST_WAITING = 64  # positions of a request whose hidden states wait to be taken in
_TAIL = 16  # tokens compared to see that a context still extends what was seen
_ENDED = 4  # requests that are kept after their end, as many as targets keep


@dataclass(frozen=True, slots=True, eq=False)
class _Arrival:
    """Hidden states that came for a request.

    Attributes:
        request_id: Whose.
        tokens: All tokens before the anchor.
        count: How many of the last of them it is for, n.
        parts: Hidden states of these, in order; the first may have some of tokens before.
    """

    request_id: int
    tokens: Sequence[int]
    count: int
    parts: tuple[Mapping[int, Tensor], ...]

    @property
    def start(self) -> int:
        """The first new position."""
        return len(self.tokens) - self.count

    def rows(self, layers: Sequence[int], device: torch.device) -> Tensor:
        """The hidden states of some layers side by side, [n, layers * Dt]; n > 0."""
        joined = [side_by_side(part, layers, device) for part in self.parts]
        return (joined[0] if len(joined) == 1 else torch.cat(joined))[-self.count :]


class BlockContexts:
    """The contexts of all requests.

    Args:
        runner: Gives what runs the module.
        layers: Target layers whose hidden states it reads.
        device: Where it runs.
    """

    def __init__(
        self, runner: Callable[[], BlockRunner], layers: Sequence[int], device: torch.device
    ) -> None:
        self._runner = runner
        self._layers = tuple(layers)
        self._device = device
        self._caches: dict[int, ContextCache] = {}
        self._waiting: dict[int, _Arrival] = {}  # each continues its request's cache
        self._ended: deque[tuple[ContextCache, _Arrival | None]] = deque(maxlen=_ENDED)

    @property
    def num_waiting(self) -> int:
        """Live requests with hidden states that wait to be taken in."""
        return len(self._waiting)

    def bring(self, contexts: Sequence[DraftContext]) -> list[ContextCache]:
        """Take in what came with contexts.

        Args:
            contexts: One per request.

        Returns:
            The cache of each; shorter than the context less its anchor where hidden states of the
            newest positions are missing.
        """
        self._follow([self._arrived(context) for context in contexts])
        return [self._caches[context.request_id] for context in contexts]

    def observe(self, contexts: Sequence[DraftContext]) -> None:
        """Keep hidden states until they are wanted.

        A few rows cost as much to take in as many, so rounds without drafts leave it to the next
        one that has some, or to the round in which `_MOST_WAITING` would be exceeded. Rows behind a
        gap do not wait: what fills it may be gone by then.

        Args:
            contexts: One per request.
        """
        many = []
        for context in contexts:
            new = self._arrived(context)
            if 0 < new.count < _MOST_WAITING and self._aligned(new).length == new.start:
                self._waiting[context.request_id] = new
            else:
                many.append(new)
        self._follow(many)

    def covered(self, tokens: Sequence[int]) -> int:
        """How many leading tokens of a text `adopt` could begin a request with."""
        self._take_waiting(tokens)
        return max((whole for whole, _, _ in self._lenders(tokens)), default=0)

    def adopt(self, request_id: int, tokens: Sequence[int]) -> None:
        """Begin a request with tokens that no hidden states will come for.

        Args:
            request_id: Whose; what was kept of it before is forgotten.
            tokens: A beginning of what was asked of `covered`, as long as that said or shorter.
        """
        self._waiting.pop(request_id, None)
        cache = self._caches[request_id] = self._runner().new_cache()
        self._bridge(cache, tokens)

    def release(self, request_id: int) -> None:
        """End a request; unknown ids are ignored."""
        cache = self._caches.pop(request_id, None)
        waiting = self._waiting.pop(request_id, None)
        if cache is not None:
            self._ended.append((cache, waiting))

    # -- arrivals -----------------------------------------------------------------------------

    def _follow(self, arrivals: Sequence[_Arrival]) -> None:
        """Bring every request's cache in step with its context."""
        ready: list[NewRows] = []
        lacking: list[NewRows] = []
        for new in arrivals:
            cache = self._aligned(new)
            if new.count:
                place = ready if cache.length == new.start else lacking
                place.append(self._rows(cache, new))
        if ready:
            self._runner().take(ready)
        for cache, tokens, features in lacking:  # a donor may be among the ready ones
            self._bridge(cache, tokens[: len(tokens) - features.shape[0]])
            self._runner().take([(cache, tokens, features)])

    def _arrived(self, context: DraftContext) -> _Arrival:
        """What a context brings, behind what waits of its request."""
        size = len(context.tokens) - 1
        given = context.features or {}
        is_whole = all(layer in given for layer in self._layers)
        count = min(rows_of(given), size) if is_whole else 0
        parts = (given,) if count else ()
        waiting = self._waiting.pop(context.request_id, None)
        if waiting is not None:
            if len(waiting.tokens) == size - count:
                count, parts = waiting.count + count, (*waiting.parts, *parts)
            else:  # positions come again, or some are missing
                self._follow([waiting])
        return _Arrival(context.request_id, context.tokens[:size], count, parts)

    def _rows(self, cache: ContextCache, new: _Arrival) -> NewRows:
        return cache, new.tokens, new.rows(self._layers, self._device)

    def _aligned(self, new: _Arrival) -> ContextCache:
        """The request's cache, holding nothing from the first new position on."""
        cache = self._caches.get(new.request_id)
        if cache is not None:
            seen = min(cache.length, len(new.tokens))
            tail = slice(max(0, seen - _TAIL), seen)
            if cache.tokens[tail] != list(new.tokens[tail]):
                cache = None
        if cache is None:
            cache = self._runner().new_cache()
        # A recomputed request brings positions again that the cache holds already.
        cache.truncate(new.start)
        self._caches[new.request_id] = cache
        return cache

    # -- beginnings that requests have in common ----------------------------------------------

    def _bridge(self, cache: ContextCache, tokens: Sequence[int]) -> None:
        """Fill positions that no hidden states came for."""
        self._take_waiting(tokens)
        lenders = sorted(self._lenders(tokens), key=lambda lender: lender[1::-1])
        if lenders and lenders[-1][1] > cache.length:
            cache.borrow(lenders[-1][2], lenders[-1][1])
        if cache.length < len(tokens):
            cache.skip(tokens[cache.length :])

    def _lenders(self, tokens: Sequence[int]) -> list[tuple[int, int, ContextCache]]:
        """Whom the beginning of a text can be borrowed from.

        Returns:
            (whole, common, cache) each: tokens it can lend without a gap, tokens its text has in
            common with this one.
        """
        lenders = []
        for cache in [*self._caches.values(), *(cache for cache, _ in self._ended)]:
            common = common_length(cache.tokens, tokens)
            lenders.append((common if cache.can_lend(common) else 0, common, cache))
        return lenders

    def _take_waiting(self, tokens: Sequence[int]) -> None:
        """Take in what waits and belongs to the beginning of a text."""
        sharing = [
            request_id
            for request_id, waiting in self._waiting.items()
            if common_length(waiting.tokens, tokens) > waiting.start
        ]
        if sharing:  # they continue their caches, so this comes to no gap
            self._follow([self._waiting.pop(request_id) for request_id in sharing])
        for place, (cache, waiting) in enumerate(self._ended):
            if waiting is not None and common_length(waiting.tokens, tokens) > waiting.start:
                self._runner().take([self._rows(cache, waiting)])
                self._ended[place] = cache, None
