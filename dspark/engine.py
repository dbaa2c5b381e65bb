"""Engine: prompts in, rounds, tokens out. Continuous batching, streaming, cancellation.

Requests join and leave between rounds; every round is one forward over all of them (rounds.py).
Who may join, and who has to leave where memory runs out, is decided in admission.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dspark.active import ActiveRequest, Phase
from dspark.admission import Admission
from dspark.draft.base import Drafter, SavesTime
from dspark.draft.none import NoDrafter
from dspark.engine_config import EngineConfig, priorities
from dspark.engine_stats import EngineStats
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
from dspark.verify.constraint import PathMasks
from dspark.verify.noise import NoiseKey
from dspark.verify.scheduler_setting import Schedule

if TYPE_CHECKING:
    from dspark.loading import StepCosts

__all__ = ["Engine", "EngineConfig", "EngineStats", "StreamChunk"]


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
        if isinstance(self._drafter, SavesTime):
            self._drafter.saves_time = self._config.auto_off
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
        self._admission = Admission(
            self._cache,
            self._intake,
            max_batch=self._config.max_batch,
            ageing=self._config.ageing,
            rounds=self._runner,
        )
        self._next_id = 0

    @staticmethod
    def load(  # noqa: PLR0913 - one keyword per option of the command line
        target: str | Path = "smollm2-135m",
        draft: str | Path | None = "auto",
        *,
        dtype: str = "auto",
        device: str = "auto",
        exact: bool | None = None,
        quant: str = "none",
        draft_quant: str = "auto",
        threads: int | None = None,
        expert_memory: int | str | None = None,
        think: bool | None = None,
        effort: str | None = None,
        config: EngineConfig | None = None,
        step_costs: StepCosts | None = None,
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
            quant: Round the weights of linear layers to "int8" or "int4" as they are loaded: faster
                on CPUs, and another model, which speculation is lossless against.
            draft_quant: The same for the draft: "none", "int8", or "auto", which rounds a draft
                module where that is faster, and a draft model as the target. Texts keep their law.
            threads: CPU threads, None for torch's own choice.
            expert_memory: Bytes ("32GiB") of routed experts to keep in memory, the others being
                read from disk as they are wanted (DeepSeek-V4); None keeps all.
            think: Have the model think before it answers, or not; None leaves it to the model.
            effort: How hard: "low", "high" or "max", for models that know it (DeepSeek-V4).
            config: Settings.
            step_costs: Asked what steps of the target cost where the schedule goes by that, a draft
                is there and `config` does not say: `dspark.eval.profile_auto.kept_or_quick` finds a
                kept profile or measures one in two seconds. None learns it while the engine runs.

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
            quant=quant,
            draft_quant=draft_quant,
            threads=threads,
            expert_memory=expert_memory,
            think=think,
            effort=effort,
            config=config,
            step_costs=step_costs,
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
        return self._admission.num_unfinished

    @property
    def stats(self) -> EngineStats:
        """What was done so far, over all requests; goes on counting."""
        return self._admission.stats

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
                2 counts twice. Such a request also stands in line as if it had come
                `EngineConfig.ageing` rounds earlier. It decides about speed, never about the text.

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
        masks: list[PathMasks | None] = [None] * own.n
        rule = Rule.GREEDY
        try:
            rule = own.resolved_rule
            if own.draft:
                self._schedule.check(rule)
            tokens = self._intake.encode(prompt)
            bad_words = self._intake.bad_words(own)
            self._intake.check(tokens, own, rule)
            masks = [self._intake.masks(own) for _ in range(own.n)]
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
                masks=masks[sample],
                prompt_index=prompt_index,
                leader=requests[0] if requests else None,
                priority=weight,
                switch=PayoffSwitch(allowed=self._config.auto_off),
            )
            self._next_id += 1
            requests.append(request)
            if error is not None:
                request.fail(error.message, error.hint)
            self._admission.add(request)
        return requests

    def cancel(self, request: ActiveRequest) -> None:
        """End a request; what it generated stays in its result."""
        self._admission.cancel(request)

    def step(self) -> None:
        """Run one round of everything that is active, after admitting what fits."""
        self._admission.admit()
        if self._admission.active:
            rows = self._runner.run(self._admission.active, self._admission.make_room)
            self.stats.rounds += rows > 0
            self.stats.rows += rows
            self.stats.experts_chosen = self._runner.experts.chosen
            self.stats.experts_woken = self._runner.experts.woken
        self._admission.retire()

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

    def _abandon(self, requests: Sequence[ActiveRequest]) -> None:
        for request in requests:
            self._admission.cancel(request)
