"""What the benchmark asks of a runner, and the clock that all runners share."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from dspark.eval.bench_records import RequestRecord, RunOutput

__all__ = [
    "Arrivals",
    "BenchRequest",
    "Progress",
    "Runner",
    "failure",
    "one_sentence",
    "token_progress",
]

Progress = Callable[[float], None]
"""Told the share of a run that is done, 0 to 1."""

_LONGEST_REASON = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """One prompt, for every runner the same.

    Attributes:
        question_id: As in the prompt set.
        category: As in the prompt set.
        text: What the user says.
        token_ids: The prompt as the target's tokenizer and chat template make it.
        seed: Seed of its noise.
    """

    question_id: str | int
    category: str
    text: str
    token_ids: tuple[int, ...]
    seed: int


@runtime_checkable
class Runner(Protocol):
    """Answers prompts and tells when the tokens came."""

    @property
    def library(self) -> Mapping[str, str] | None:
        """Name and version of the program behind it, None for dspark itself or if unknown."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of its figures must know, known once it is prepared."""
        ...

    @property
    def is_local(self) -> bool:
        """True if it runs in this process, so that the process's memory is its memory."""
        ...

    def refuses(self, concurrency: int) -> str | None:
        """Why it cannot keep so many requests under way, None if it can."""
        ...

    def prepare(self) -> None:
        """Load what it needs; called once, before the first run.

        Raises:
            DsparkError: If it cannot run at all.
        """
        ...

    def run(
        self, requests: Sequence[BenchRequest], concurrency: int, on_progress: Progress
    ) -> RunOutput:
        """Answer all prompts, `concurrency` at a time.

        Args:
            requests: The prompts.
            concurrency: How many to keep under way.
            on_progress: Told the share of the run that is done.

        Returns:
            Records in the order of the prompts; one that fails has an error and the others go on.
        """
        ...

    def close(self) -> None:
        """Let go of what it loaded."""
        ...


@dataclass(slots=True)
class Arrivals:
    """When the tokens of one request came; made when the request is sent.

    Attributes:
        sent: When it was sent (time.perf_counter).
        chunks: (when, tokens) of every chunk.
    """

    sent: float = field(default_factory=time.perf_counter)
    chunks: list[tuple[float, int]] = field(default_factory=list)

    def add(self, tokens: int, when: float | None = None) -> None:
        """Note a chunk of so many tokens; none is no chunk."""
        if tokens > 0:
            self.chunks.append((time.perf_counter() if when is None else when, tokens))

    @property
    def count(self) -> int:
        """Tokens that came."""
        return sum(tokens for _, tokens in self.chunks)

    def record(
        self,
        request: BenchRequest,
        *,
        prompt_tokens: int | None = None,
        token_ids: Sequence[int] | None = None,
        has_rounds: bool = False,
        error: str | None = None,
        ended: float | None = None,
    ) -> RequestRecord:
        """The record of the request.

        Args:
            request: Which.
            prompt_tokens: Tokens of its prompt as the runner counts them, None for ours.
            token_ids: Its answer, if the runner tells.
            has_rounds: Every chunk after the first is one forward.
            error: One sentence if it failed.
            ended: When it failed, None for now.
        """
        times = [when for when, _ in self.chunks]
        gaps = tuple(
            (when - before, tokens)
            for before, (when, tokens) in zip(times, self.chunks[1:], strict=False)
        )
        end = times[-1] if times else self.sent
        if error is not None:
            end = time.perf_counter() if ended is None else ended
        return RequestRecord(
            question_id=request.question_id,
            category=request.category,
            prompt_tokens=len(request.token_ids) if prompt_tokens is None else prompt_tokens,
            output_tokens=self.count,
            ttft=times[0] - self.sent if times else None,
            seconds=end - self.sent,
            gaps=gaps,
            rounds=len(gaps) if has_rounds else None,
            committed=sum(tokens for _, tokens in gaps) if has_rounds else None,
            digest=None if token_ids is None else _digest(token_ids),
            error=error,
        )


def token_progress(expected: int, on_progress: Progress) -> Callable[[int], None]:
    """Make a call that takes the number of tokens that came and tells the share of a run.

    Args:
        expected: Tokens the run will bring at the most.
        on_progress: Told the share.
    """
    count = 0

    def came(tokens: int) -> None:
        nonlocal count
        count += tokens
        on_progress(min(1.0, count / max(1, expected)))

    return came


def failure(request: BenchRequest, error: str, seconds: float = 0.0) -> RequestRecord:
    """The record of a request that failed before its first token."""
    return RequestRecord(
        question_id=request.question_id,
        category=request.category,
        prompt_tokens=len(request.token_ids),
        output_tokens=0,
        ttft=None,
        seconds=seconds,
        error=error,
    )


def one_sentence(exc: BaseException) -> str:
    """An exception as one short sentence."""
    lines = str(exc).strip().splitlines()
    text = lines[0].rstrip(".") if lines else type(exc).__name__
    return (text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "...") + "."


def _digest(token_ids: Sequence[int]) -> str:
    text = ",".join(str(token) for token in token_ids)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
