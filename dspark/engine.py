"""Engine: prompts in, rounds, tokens out. Continuous batching, streaming, cancellation.

Requests join and leave between rounds; every round is one forward over all of them (rounds.py).
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark.active import ActiveRequest, Phase
from dspark.draft.base import Drafter
from dspark.draft.none import NoDrafter
from dspark.engine_config import EngineConfig, priorities
from dspark.errors import ConfigError, DataError, DsparkError
from dspark.intake import Intake
from dspark.output import OutputText, TextPiece
from dspark.payoff import PayoffSwitch
from dspark.request import (
    GenerationResult,
    Prompt,
    Rule,
    SamplingParams,
)
from dspark.rounds import RoundRunner
from dspark.target import Target
from dspark.text import TextCodec
from dspark.verify.noise import NoiseKey
from dspark.verify.scheduler_setting import Schedule

__all__ = ["Engine", "EngineConfig", "StreamChunk"]


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What a stream yields after a round.

    Attributes:
        pieces: New text, token by token as far as it is certain.
        token_ids: New tokens.
        result: The finished sample with the last chunk, else None.
    """

    pieces: tuple[TextPiece, ...]
    token_ids: tuple[int, ...]
    result: GenerationResult | None = None

    @property
    def text(self) -> str:
        """The new text."""
        return "".join(piece.text for piece in self.pieces)


class Engine:
    """Generates with a target and a drafter.

    Args:
        target: The target.
        drafter: The drafter; None decodes plainly.
        codec: The target's text codec; without one, prompts are token ids.
        config: Settings.
        sampling_defaults: The model's own sampling defaults (see `default_params`).

    Example:
        >>> engine = Engine.load(target="smollm2-135m")  # doctest: +SKIP
        >>> engine.generate(["The capital of France is"])[0].text  # doctest: +SKIP
        ' Paris...'
    """

    def __init__(
        self,
        target: Target,
        *,
        drafter: Drafter | None = None,
        codec: TextCodec | None = None,
        config: EngineConfig | None = None,
        sampling_defaults: Mapping[str, float] | None = None,
    ) -> None:
        self._target = target
        self._drafter: Drafter = NoDrafter() if drafter is None else drafter
        self._codec = codec
        self._config = EngineConfig() if config is None else config
        self._defaults = dict(sampling_defaults or {})
        self._cache = target.new_cache(memory_limit=self._config.memory_limit)
        self._schedule = Schedule.parse(self._config.schedule)
        self._runner = RoundRunner(
            target,
            self._cache,
            self._drafter,
            self._config.limits,
            schedule=self._schedule,
            step_seconds=self._config.step_seconds,
        )
        self._intake = Intake(
            target,
            codec,
            self._cache,
            memory_limit=self._config.memory_limit,
            tree_budget=self._config.limits.tree_budget,
        )
        self._waiting: deque[ActiveRequest] = deque()
        self._active: list[ActiveRequest] = []
        self._next_id = 0

    @staticmethod
    def load(  # noqa: PLR0913 - one keyword per option of the command line
        target: str | Path = "smollm2-135m",
        draft: str | Path | None = "auto",
        *,
        dtype: str = "auto",
        device: str = "auto",
        exact: bool | None = None,
        threads: int | None = None,
        expert_memory: int | str | None = None,
        think: bool | None = None,
        effort: str | None = None,
        config: EngineConfig | None = None,
    ) -> Engine:
        """Load a target and a draft and make an engine of them.

        Args:
            target: Alias, folder, .gguf file or hub id; "hf:" before it runs the model as
                transformers does, for plain decoding only.
            draft: "auto", "none", "lookup", "lookup:FILE", a model like `target`, or one of these
                with "+lookup".
            dtype: "auto", "float32", "bfloat16" or "float16".
            device: "auto" or a torch device; for DeepSeek-V4 also several, with commas between,
                which its layers are split over.
            exact: Exact mode: True, False, or None to let the probe at load decide.
            threads: CPU threads, None for torch's own choice.
            expert_memory: Bytes ("32GiB") of routed experts to keep in memory, the others being
                read from disk as they are wanted (DeepSeek-V4); None keeps all.
            think: Have the model think before it answers, or not; None leaves it to the model.
            effort: How hard: "low", "high" or "max", for models that know it (DeepSeek-V4).
            config: Settings.

        Returns:
            The engine.

        Raises:
            CheckpointError: If a model cannot be found or read.
            CapabilityError: If it cannot be verified, or exact mode was asked for and fails.
            ConfigError: If target and draft do not fit each other.
        """
        from dspark.loading import load_engine

        return load_engine(
            target,
            draft,
            dtype=dtype,
            device=device,
            exact=exact,
            threads=threads,
            expert_memory=expert_memory,
            think=think,
            effort=effort,
            config=config,
        )

    @property
    def target(self) -> Target:
        """The target."""
        return self._target

    @property
    def drafter(self) -> Drafter:
        """The drafter."""
        return self._drafter

    @property
    def codec(self) -> TextCodec | None:
        """The text codec."""
        return self._codec

    @property
    def config(self) -> EngineConfig:
        """Settings."""
        return self._config

    @property
    def sampling_defaults(self) -> dict[str, float]:
        """Sampling parameters the model itself recommends; empty if it recommends none."""
        return dict(self._defaults)

    @property
    def cache_pages(self) -> int:
        """Pages of K/V in use."""
        return self._cache.usage().pages

    @property
    def num_unfinished(self) -> int:
        """Requests waiting or running."""
        return len(self._waiting) + len(self._active)

    # -- whole calls --------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_result: Callable[[GenerationResult], None] | None = None,
        priority: float | Sequence[float] = 1.0,
    ) -> list[GenerationResult]:
        """Generate for a list of prompts, batched.

        Args:
            prompts: A list of prompts: strings (raw text), lists of token ids or lists of chat
                messages.
            params: Sampling parameters for all, or one for each.
            on_result: Called with every result as it finishes.
            priority: As in `submit`, for all or one for each.

        Returns:
            n consecutive results per prompt, in order. A prompt that fails has `error` set in its
            results; the others go on.

        Raises:
            ConfigError: If `prompts` is a single string, the lengths differ, or a priority is out
                of range.
        """
        if isinstance(prompts, str):
            raise ConfigError("prompts is a string, but must be a list.", hint="pass [prompt]")
        per_prompt = self._spread(params, len(prompts))
        weights = priorities(priority, len(prompts))
        requests: list[ActiveRequest] = []
        reported: set[int] = set()
        try:
            for index, (prompt, own) in enumerate(zip(prompts, per_prompt, strict=True)):
                weight = weights[index]
                requests.extend(self.submit(prompt, own, prompt_index=index, priority=weight))
            while any(request.phase is not Phase.DONE for request in requests):
                self.step()
                if on_result is not None:
                    for request in requests:
                        if request.phase is Phase.DONE and request.request_id not in reported:
                            reported.add(request.request_id)
                            on_result(request.result())
        finally:
            self._abandon(requests)
        return [request.result() for request in requests]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: float = 1.0
    ) -> Iterator[StreamChunk]:
        """Generate one sample and yield it round by round.

        Closing the iterator cancels the request.

        Args:
            prompt: As in `generate`.
            params: Sampling parameters with n = 1.
            priority: As in `submit`.

        Yields:
            Chunks; the last one carries the result.

        Raises:
            ConfigError: If n is not 1, or the priority is out of range.
            DsparkError: If the prompt cannot be used.
        """
        own = SamplingParams() if params is None else params
        if own.n != 1:
            raise ConfigError(f"n is {own.n}, but a stream yields one sample.")
        (request,) = self.submit(prompt, own, priority=priority)
        yield from self.follow(request)

    def follow(self, request: ActiveRequest) -> Iterator[StreamChunk]:
        """Run rounds until a submitted request is done, and yield its output.

        Other requests go on in the same rounds. Closing the iterator cancels the request.

        Args:
            request: What `submit` returned.

        Yields:
            Chunks; the last one carries the result.

        Raises:
            DataError: If the request failed.
        """
        try:
            while True:
                if request.phase is not Phase.DONE:
                    self.step()
                is_done = request.phase is Phase.DONE
                if request.error is not None:
                    raise DataError(request.error, hint=request.hint)
                if is_done or request.fresh:
                    chunk = StreamChunk(
                        tuple(request.pieces),
                        tuple(request.fresh),
                        request.result() if is_done else None,
                    )
                    request.pieces.clear()
                    request.fresh.clear()
                    yield chunk
                if is_done:
                    return
        finally:
            self._abandon([request])

    # -- requests -----------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        prompt_index: int = 0,
        priority: float = 1.0,
    ) -> list[ActiveRequest]:
        """Queue a prompt; `step` runs it.

        Args:
            prompt: As in `generate`.
            params: Sampling parameters.
            prompt_index: Number to put into the results.
            priority: What a token of this request is worth where requests compete for rows, > 0;
                2 counts twice. It decides about speed, not about the order of admission and never
                about the text.

        Returns:
            One request per sample. A prompt that cannot be used gives requests that are done, with
            `error` set; so does a rule that the engine's schedule does not allow.

        Raises:
            ConfigError: If the priority is out of range.
        """
        (weight,) = priorities(priority, 1)
        own = SamplingParams() if params is None else params
        seed = secrets.randbits(63) if own.seed is None else own.seed
        error: DsparkError | None = None
        tokens: list[int] = []
        bad_words: tuple[tuple[int, ...], ...] = ()
        rule = Rule.GREEDY
        try:
            rule = own.resolved_rule
            if own.draft:
                self._schedule.check(rule)
            tokens = self._intake.encode(prompt)
            bad_words = self._intake.bad_words(own)
            self._intake.check(tokens, own, rule)
        except DsparkError as exc:
            error = exc
        requests: list[ActiveRequest] = []
        for sample in range(own.n):
            request = ActiveRequest(
                request_id=self._next_id,
                prompt=tokens,
                params=own,
                rule=rule,
                noise=NoiseKey(seed, sample),
                output=OutputText(self._codec, own.stop),
                bad_words=bad_words,
                prompt_index=prompt_index,
                leader=requests[0] if requests else None,
                priority=weight,
                switch=PayoffSwitch(allowed=self._config.auto_off),
            )
            self._next_id += 1
            requests.append(request)
            if error is not None:
                request.fail(error.message, error.hint)
            else:
                self._waiting.append(request)
        return requests

    def cancel(self, request: ActiveRequest) -> None:
        """End a request; what it generated stays in its result."""
        if request.phase is not Phase.DONE:
            request.cancel()
        if request in self._waiting:
            self._waiting.remove(request)
        self._retire()

    def step(self) -> None:
        """Run one round of everything that is active, after admitting what fits."""
        self._admit()
        if self._active:
            self._runner.run(self._active)
        self._retire()

    # -- inside -------------------------------------------------------------------------------

    def _spread(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [SamplingParams() if params is None else params] * count
        if len(params) != count:
            raise ConfigError(
                f"{len(params)} sampling parameters were given for {count} prompts, but one for "
                "all or one for each is needed."
            )
        return list(params)

    def _admit(self) -> None:
        blocked: list[ActiveRequest] = []
        while self._waiting and len(self._active) < self._config.max_batch:
            request = self._waiting.popleft()
            leader = request.leader
            if leader is not None and leader.phase in (Phase.WAITING, Phase.PREFILL):
                blocked.append(request)  # the leader's prefill will be shared
                continue
            if not self._open(request):
                blocked.append(request)
                break
        self._waiting.extendleft(reversed(blocked))

    def _open(self, request: ActiveRequest) -> bool:
        """Give a request its slot; False if the cache has no room for it yet."""
        # Features of shared tokens would be missing for drafters that read them.
        tokens = [] if self._drafter.capture else request.prompt
        rows = self._intake.rows_needed(len(request.prompt), request.params)
        slot, shared = self._cache.open(tokens)
        try:
            self._cache.reserve(slot, rows - shared)
        except DsparkError as exc:
            self._cache.release(slot)
            if self._active:
                return False  # they will free memory
            if not shared:
                request.fail(exc.message, exc.hint)
                return True
            # What it shares holds more memory than it saves: start without.
            self._cache.forget_kept()
            slot, shared = self._cache.open([])
            try:
                self._cache.reserve(slot, rows)
            except DsparkError as again:
                self._cache.release(slot)
                request.fail(again.message, again.hint)
                return True
        request.slot = slot
        request.stats.shared_prefix = shared
        request.phase = Phase.PREFILL
        self._active.append(request)
        return True

    def _retire(self) -> None:
        done = [request for request in self._active if request.phase is Phase.DONE]
        for request in done:
            if request.slot is not None:
                self._cache.release(request.slot)
                request.slot = None
            self._runner.release(request.request_id)
            request.features.clear()
            request.stats.seconds_total = time.perf_counter() - request.submitted_at
        if done:
            self._active = [r for r in self._active if r.phase is not Phase.DONE]

    def _abandon(self, requests: Sequence[ActiveRequest]) -> None:
        for request in requests:
            if request.phase is not Phase.DONE:
                request.cancel()
        self._waiting = deque(r for r in self._waiting if r.phase is not Phase.DONE)
        self._retire()
