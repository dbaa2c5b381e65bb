"""A request in the engine: its state from submission to result."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum

from dspark.captured import Part
from dspark.errors import DsparkError
from dspark.output import OutputText, TextPiece
from dspark.payoff import PayoffSwitch
from dspark.request import (
    FinishReason,
    GenerationResult,
    RequestStats,
    Rule,
    SamplingParams,
    TokenLogprob,
)
from dspark.verify.constraint import PathMasks
from dspark.verify.noise import NoiseKey

__all__ = ["ActiveRequest", "Phase"]


class Phase(Enum):
    """Where a request stands."""

    WAITING = "waiting"  # for its first round, or for memory after a preemption
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@dataclass(eq=False, slots=True)
class ActiveRequest:
    """One sample of one prompt.

    Attributes:
        request_id: Stable identity.
        prompt: Prompt token ids.
        params: Sampling parameters.
        rule: Acceptance rule in force.
        noise: Noise key.
        output: Decoder and stop strings.
        bad_words: Token sequences that must not be completed.
        masks: What its grammar allows from here on, None without a grammar.
        prompt_index: Index of the prompt in the caller's list.
        leader: The request with the same prompt that prefills first, or None.
        priority: Weight of its tokens when rows are shared out (docs/scheduling.md), > 0.
        order: Its place among requests, lower ones first (`dspark.admission`).
        tokens: Prompt and generated tokens; the last one is the anchor once decoding.
        phase: Where it stands.
        slot: Slot in the cache while it has one.
        shared: Tokens that the slot took over from another request.
        may_share: False where taking over others' memory stood in its way before.
        is_awaited: True while other samples wait for its prompt.
        lost: Tokens in the cache that the last preemption cost.
        waiting_since: When it began to wait, by the performance counter.
        rounds: Rounds run.
        finish_reason: Why it ended.
        error: One sentence if it failed.
    """

    request_id: int
    prompt: list[int]
    params: SamplingParams
    rule: Rule
    noise: NoiseKey
    output: OutputText
    bad_words: tuple[tuple[int, ...], ...] = ()
    masks: PathMasks | None = None
    prompt_index: int = 0
    leader: ActiveRequest | None = None
    priority: float = 1.0
    order: tuple[float, int] = (0.0, 0)
    tokens: list[int] = field(default_factory=list)
    phase: Phase = Phase.WAITING
    slot: int | None = None
    shared: int = 0
    may_share: bool = True
    is_awaited: bool = False
    lost: int = 0
    rounds: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    hint: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    stats: RequestStats = field(default_factory=RequestStats)
    switch: PayoffSwitch = field(default_factory=PayoffSwitch)
    features: list[Part] = field(default_factory=list)
    pieces: list[TextPiece] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    submitted_at: float = field(default_factory=time.perf_counter)
    waiting_since: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.stats.prompt_tokens = len(self.prompt)
        self.waiting_since = self.submitted_at

    @property
    def generated(self) -> list[int]:
        """Generated token ids."""
        return self.tokens[len(self.prompt) :]

    @property
    def num_generated(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens) - len(self.prompt)

    @property
    def num_prefill(self) -> int:
        """Tokens that must be in the cache before a round: the prompt, or all but the anchor."""
        return len(self.tokens) - (1 if len(self.tokens) > len(self.prompt) else 0)

    def remaining(self, max_positions: int) -> int:
        """Tokens it may still generate."""
        by_context = max_positions - len(self.tokens)
        return min(self.params.max_tokens - self.num_generated, by_context)

    def append(
        self, token: int, *, is_drafted: bool, eos: frozenset[int], max_positions: int
    ) -> bool:
        """Add a generated token; end the request if it ends the text.

        Args:
            token: The token.
            is_drafted: True for an accepted draft token.
            eos: Tokens that end a text.
            max_positions: The target's longest context.

        Returns:
            True if the request goes on.
        """
        self.tokens.append(token)
        self.fresh.append(token)
        size = len(self.tokens)
        generated = size - len(self.prompt)
        if generated == 1:
            self.stats.time_to_first_token = time.perf_counter() - self.submitted_at
        is_end = token in eos and not self.params.ignore_eos
        if is_end or self.output.push(token, is_drafted=is_drafted):
            self._end(FinishReason.STOP)
        elif generated >= self.params.max_tokens or size >= max_positions:
            self._end(FinishReason.LENGTH)
        elif self.masks is not None:
            self._advance(self.masks, token)
        self.pieces.extend(self.output.take(is_final=self.phase is Phase.DONE))
        return self.phase is not Phase.DONE

    def _advance(self, masks: PathMasks, token: int) -> None:
        try:
            masks.advance(token)
        except DsparkError as exc:
            self.fail(exc.message, exc.hint)

    def _end(self, reason: FinishReason) -> None:
        if self.output.finish() and reason is FinishReason.LENGTH:
            reason = FinishReason.STOP
        self.phase = Phase.DONE
        self.finish_reason = reason

    def fail(self, error: str, hint: str | None = None) -> None:
        """End the request with an error."""
        self.error, self.hint = error, hint
        self._end(FinishReason.ERROR)

    def cancel(self) -> None:
        """End the request because nobody wants it any more."""
        self._end(FinishReason.CANCELLED)
        self.pieces.extend(self.output.take(is_final=True))

    def result(self) -> GenerationResult:
        """The finished sample."""
        self.stats.output_tokens = self.num_generated
        self.stats.speculation_switched_off = self.switch.off_count
        return GenerationResult(
            text=self.output.text,
            token_ids=self.generated,
            finish_reason=self.finish_reason or FinishReason.CANCELLED,
            logprobs=self.logprobs if self.params.logprobs is not None else None,
            error=self.error,
            hint=self.hint,
            stats=self.stats,
            prompt_index=self.prompt_index,
            sample_index=self.noise.sample,
            seed=None if self.rule is Rule.GREEDY else self.noise.seed,
        )
