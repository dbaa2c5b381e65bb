"""A request under way: what the engine's thread sends to the event loop, and who waits for it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dspark.active import ActiveRequest
from dspark.output import TextPiece
from dspark.request import GenerationResult, SamplingParams, TokenLogprob
from dspark.serve.failures import ApiError
from dspark.text import TextCodec

__all__ = ["ClientGoneError", "Delta", "Job"]


class ClientGoneError(Exception):
    """Nobody reads the answer any more."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What a choice gained in a round.

    Attributes:
        index: The choice.
        pieces: New text that is certain.
        token_ids: New tokens.
        logprobs: Theirs, if asked for.
        result: The whole choice, with its last delta.
    """

    index: int
    pieces: tuple[TextPiece, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    result: GenerationResult | None = None


class Job:
    """One HTTP request's work: its prompts, and the choices that come of them.

    The engine's thread owns `requests`, `reported` and `notes`; all else is the event loop's.
    What waits to be read is bounded by the tokens that the request asked for.

    Args:
        prompts: Token ids of every prompt.
        params: Sampling parameters of all of them.
        codec: What decodes the answers where the engine's own codec would drop tokens that
            structure them; None for the engine's.

    Attributes:
        requests: What the engine made of it, one per choice.
        reported: Choices whose last delta was sent.
        notes: What a watcher keeps of the requests.
        results: Choices that are whole.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        codec: TextCodec | None = None,
    ) -> None:
        self.prompts = [list(prompt) for prompt in prompts]
        self.params = params
        self.codec = codec
        self.requests: list[ActiveRequest] = []
        self.reported: set[int] = set()
        self.notes: dict[int, Any] = {}
        self.results: dict[int, GenerationResult] = {}
        self._inbox: deque[Delta] = deque()
        self._news = asyncio.Event()
        self._error: ApiError | None = None
        self._is_gone = False

    @property
    def num_choices(self) -> int:
        """Choices that it makes."""
        return len(self.prompts) * self.params.n

    @property
    def is_whole(self) -> bool:
        """True once every choice has its result."""
        return len(self.results) == self.num_choices

    def take_in(self, deltas: Sequence[Delta]) -> None:
        """Take in what a round brought."""
        self._inbox.extend(deltas)
        for delta in deltas:
            if delta.result is not None:
                self.results[delta.index] = delta.result
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """End it with an error; what has come is still read first."""
        if self._error is None and not self.is_whole:
            self._error = error
        self._news.set()

    def abandon(self) -> None:
        """Note that the client has gone."""
        self._is_gone = True
        self._news.set()

    async def next(self) -> list[Delta]:
        """Wait for news.

        Returns:
            What came since the last call; empty at the end.

        Raises:
            ApiError: If it failed.
            ClientGoneError: If the client has gone.
        """
        while True:
            if self._is_gone:
                raise ClientGoneError
            if self._inbox:
                deltas = list(self._inbox)
                self._inbox.clear()
                return deltas
            if self._error is not None:
                raise self._error
            if self.is_whole:
                return []
            self._news.clear()
            await self._news.wait()
