"""Takes requests in: limits, prompts, grammars, places in the queue."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from dspark.engine import Engine
from dspark.errors import DsparkError
from dspark.serve.answers import Answer
from dspark.serve.choices import Choice
from dspark.serve.constraints import Constraint, Grammars, format_constraint
from dspark.serve.failures import ApiError, bad_request, scrub
from dspark.serve.fields import ChatFields, CompletionFields, SharedFields
from dspark.serve.forms import AnswerForm, ChatForm, TextForm
from dspark.serve.jobs import Job
from dspark.serve.layout import Layout
from dspark.serve.logprobs import LogprobFeed
from dspark.serve.metrics import Metrics
from dspark.serve.prompting import encode_chat, wanted_thinking
from dspark.serve.replies import Reply
from dspark.serve.sampling import check_counts, sampling_params
from dspark.serve.settings import ServeConfig
from dspark.serve.spelling import Spelling
from dspark.serve.tools import ToolPlan, plan_tools
from dspark.serve.worker import EngineWorker
from dspark.text import TextCodec

__all__ = ["Desk"]

_T = TypeVar("_T")

_RETRY_SECONDS = "2"


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What the intake's thread made of a request."""

    prompts: list[list[int]]
    grammar: Any = None


class Desk:
    """Where requests become jobs of the engine.

    Everything that reads texts (tokenizer, template, grammars) runs in one thread of its own with
    a codec of its own: it would hold up the event loop, and tokenizers are not for two threads.

    Args:
        engine: The engine; the desk's worker owns it from now on.
        config: Limits and names.
        metrics: What counts.
    """

    def __init__(self, engine: Engine, config: ServeConfig, metrics: Metrics) -> None:
        self.config = config
        self._info = engine.target.info
        self._defaults = engine.sampling_defaults
        self._capacity = engine.config.max_batch + config.max_queue
        codec = engine.codec
        self._codec: TextCodec | None = copy.deepcopy(codec)
        self._layout = None if codec is None else Layout(codec)
        self._spelling = None if codec is None else Spelling(codec)
        self._grammars = None if self._codec is None else Grammars(self._codec)
        self._names = {str(self._info.name): config.model}
        self.worker = EngineWorker(engine, watch=metrics.watch, names=self._names)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dspark-intake")
        self._jobs: set[Job] = set()
        self._taken = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = False

    @property
    def is_ready(self) -> bool:
        """True while it takes requests."""
        return self.worker.is_alive and not self.is_draining

    @property
    def max_positions(self) -> int:
        """Tokens of the model's context."""
        return self._info.max_positions

    # -- places -------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def place(self, choices: int) -> AsyncIterator[None]:
        """Hold places for so many choices.

        Raises:
            ApiError: 429 if there are none left, 503 if the server stops or its engine is dead.
        """
        if self.is_draining:
            raise ApiError(
                503,
                "the server is stopping.",
                kind="server_error",
                headers={"retry-after": "10"},
            )
        if not self.worker.is_alive:
            raise ApiError(503, "the server's engine has failed.", kind="server_error")
        if self._taken and self._taken + choices > self._capacity:
            raise ApiError(
                429,
                f"the queue is full: {self._taken} choices are under way or wait.",
                kind="rate_limit_error",
                code="queue_full",
                headers={"retry-after": _RETRY_SECONDS},
            )
        self._taken += choices
        self._idle.clear()
        try:
            yield
        finally:
            self._taken -= choices
            if not self._taken:
                self._idle.set()

    def submit(self, job: Job) -> None:
        """Hand a job to the engine."""
        self._jobs.add(job)
        self.worker.submit(job)

    def release(self, job: Job) -> None:
        """Let go of a job; one that still runs is cancelled."""
        self._jobs.discard(job)
        if not job.is_whole:
            self.worker.cancel(job)

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait for those under way; what is left then is ended."""
        self.is_draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            for job in self._jobs:
                job.fail(ApiError(503, "the server is stopping.", kind="server_error"))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.worker.stop(5.0)

    # -- requests -----------------------------------------------------------------------------

    async def chat(self, fields: ChatFields) -> Answer:
        """Make a job of a chat request; it is not submitted yet.

        Raises:
            ApiError: If it cannot be served.
        """
        layout = self._layout
        if layout is None or self._codec is None or not self._codec.has_chat_template:
            raise bad_request("this model has no chat template: use /v1/completions.", "messages")
        plan = plan_tools(fields)
        constraint = plan.constraint or _text_constraint(fields)
        think, effort = wanted_thinking(fields)
        if constraint is not None:
            think, effort = self._no_thinking(think, effort)
        prepared = await self._in_pool(
            lambda: self._prepare_chat(fields, plan, constraint, think, effort)
        )
        prompt = prepared.prompts[0]
        is_free = constraint is None
        reads_calls = is_free or plan.constraint is not None
        needs_tags = is_free and (layout.has_thinking or plan.is_read)
        job = self._job(prepared, fields, codec=layout.codec if needs_tags else None)
        top = None if not fields.logprobs else fields.top_logprobs or 0
        form = ChatForm(
            None if top is None else self._spelling,
            top=top or 0,
            has_pieces=_wants_pieces(fields),
            is_named=plan.name is not None,
        )

        def reply() -> Reply:
            think_stage = layout.think_stage(prompt) if is_free else None
            calls = plan.stage(layout) if reads_calls else None
            return Reply(think_stage, calls, most_calls=plan.most_calls)

        visible = layout.visible if job.codec is not None else frozenset[int]()
        return self._answer(job, form, fields, reply=reply, visible=visible)

    async def completion(self, fields: CompletionFields) -> Answer:
        """Make a job of a completion request; it is not submitted yet.

        Raises:
            ApiError: If it cannot be served.
        """
        constraint = format_constraint(fields.response_format, fields.structured_outputs)
        prepared = await self._in_pool(lambda: self._prepare_text(fields, constraint))
        job = self._job(prepared, fields)
        spelling = None if fields.logprobs is None else self._spelling
        form = TextForm(spelling, top=fields.logprobs or 0, has_pieces=_wants_pieces(fields))
        return self._answer(job, form, fields)

    def check(self, fields: SharedFields, prompts: int) -> int:
        """Check what can be checked at once.

        Returns:
            Choices that the request makes.

        Raises:
            ApiError: 400 or, for a model that is not here, 404.
        """
        if fields.model is not None and fields.model != self.config.model:
            shown = fields.model if len(fields.model) <= 100 else fields.model[:97] + "..."
            raise ApiError(
                404,
                f"the model {shown!r} does not exist here; there is {self.config.model!r}.",
                param="model",
                code="model_not_found",
            )
        check_counts(fields, self.config, prompts)
        bad = next((t for t in fields.logit_bias or () if t >= self._info.vocab_size), None)
        if bad is not None:
            raise bad_request(
                f"logit_bias: token id {bad} is outside the vocabulary, 0 to "
                f"{self._info.vocab_size - 1}.",
                "logit_bias",
            )
        return prompts * (fields.n or 1)

    # -- inside -------------------------------------------------------------------------------

    async def _in_pool(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def _no_thinking(
        self, think: bool | None, effort: str | None
    ) -> tuple[bool | None, str | None]:
        """Reasoning is not in a grammar, so answers under one come without."""
        if think or effort is not None:
            raise bad_request(
                "reasoning and a grammar for the answer exclude each other: ask for one of them.",
                "reasoning_effort" if effort is not None else "chat_template_kwargs",
            )
        has_switch = self._layout is not None and self._layout.has_switch
        return (False if has_switch else None), None

    def _prepare_chat(
        self,
        fields: ChatFields,
        plan: ToolPlan,
        constraint: Constraint | None,
        think: bool | None,
        effort: str | None,
    ) -> _Prepared:
        if self._codec is None or self._layout is None:
            raise bad_request("this model has no tokenizer.", "messages")
        tokens = encode_chat(
            self._codec, self._layout, fields, tools=plan.told, think=think, effort=effort
        )
        self._check_length(tokens, "messages")
        return _Prepared([tokens], self._compile(constraint))

    def _prepare_text(self, fields: CompletionFields, constraint: Constraint | None) -> _Prepared:
        prompts = []
        for prompt in fields.prompt:
            tokens = self._encode(prompt) if isinstance(prompt, str) else prompt
            self._check_length(tokens, "prompt")
            prompts.append(tokens)
        return _Prepared(prompts, self._compile(constraint))

    def _encode(self, text: str) -> list[int]:
        if self._codec is None:
            raise bad_request("this model has no tokenizer: send token ids.", "prompt")
        try:
            return self._codec.encode(text)
        except DsparkError as exc:
            raise bad_request(scrub(exc.message), "prompt") from exc

    def _check_length(self, tokens: Sequence[int], param: str) -> None:
        if not tokens:
            raise bad_request("the prompt is empty.", param)
        bad = next((token for token in tokens if token >= self._info.vocab_size), None)
        if bad is not None:
            raise bad_request(f"token id {bad} is outside the vocabulary.", param)
        most = self._info.max_positions - 1
        if self.config.max_prompt_tokens is not None:
            most = min(most, self.config.max_prompt_tokens)
        if len(tokens) > most:
            raise bad_request(
                f"the prompt has {len(tokens)} tokens, but this server takes {most}.",
                param,
                "context_length_exceeded",
            )

    def _compile(self, constraint: Constraint | None) -> Any:
        if constraint is None:
            return None
        if self._grammars is None:
            raise bad_request("this model has no tokenizer, so no grammar.", constraint.param)
        return self._grammars.compile(constraint)

    def _job(
        self, prepared: _Prepared, fields: SharedFields, *, codec: TextCodec | None = None
    ) -> Job:
        longest = max(len(prompt) for prompt in prepared.prompts)
        params = sampling_params(
            fields,
            self.config,
            defaults=self._defaults,
            room=self._info.max_positions - longest,
            grammar=prepared.grammar,
        )
        return Job(prepared.prompts, params, codec=codec)

    def _answer(
        self,
        job: Job,
        form: AnswerForm,
        fields: SharedFields,
        *,
        reply: Callable[[], Reply] | None = None,
        visible: frozenset[int] = frozenset(),
    ) -> Answer:
        has_logprobs = job.params.logprobs is not None and self._spelling is not None
        choices = [
            Choice(
                index,
                None if reply is None else reply(),
                LogprobFeed(self._spelling, visible) if has_logprobs and self._spelling else None,
            )
            for index in range(job.num_choices)
        ]
        return Answer(job, form, choices, model=self.config.model, fields=fields)


def _text_constraint(fields: ChatFields) -> Constraint | None:
    return format_constraint(fields.response_format, fields.structured_outputs)


def _wants_pieces(fields: SharedFields) -> bool:
    return fields.dspark is not None and bool(fields.dspark.pieces)
