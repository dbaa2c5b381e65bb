"""Answers and questions from our own engine, many at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from dspark.active import ActiveRequest, Phase
from dspark.engine import Engine, EngineConfig
from dspark.errors import ConfigError
from dspark.eval.runner import explicit_params
from dspark.request import FinishReason, Prompt, SamplingParams
from dspark.text import TextCodec
from dspark.training.data_answers import (
    Answer,
    AnswerJob,
    OnAnswer,
    OnProgress,
    QuestionJob,
    Turn,
    WrittenQuestion,
)
from dspark.training.data_filters import Drop
from dspark.training.data_prompts import ChatForm
from dspark.training.data_turns import TurnMarks

__all__ = ["EngineAnswerer"]


class _Task(Protocol):
    """A request, or several one after the other."""

    request: ActiveRequest

    def begin(self, submit: _Submit) -> None:
        """Submit the first request."""

    def go_on(self, submit: _Submit) -> bool:
        """Look at the request after a round; False once all is over."""

    @property
    def tokens_before(self) -> int:
        """Tokens made by its earlier requests."""

    @property
    def share(self) -> float:
        """How far it is, 0 .. 1."""


_Submit = Callable[[Prompt, SamplingParams], ActiveRequest]


class EngineAnswerer:
    """Asks our own engine.

    In exact mode an answer does not depend on its neighbours, the draft or the time, so answers can
    be kept one by one. Otherwise only the same sequence of rounds gives the same answers: nothing
    that goes by time decides about drafts then, and every call starts with an empty engine.

    Args:
        load: Loads the engine when it is first needed.
        batch: Requests at a time.
    """

    def __init__(self, load: Callable[[], Engine], *, batch: int) -> None:
        if batch < 1:
            raise ConfigError(f"batch is {batch}, but must be >= 1.")
        self._load = load
        self._loaded: Engine | None = None
        self._batch = batch

    @property
    def _engine(self) -> Engine:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    @property
    def keeps_partial(self) -> bool:
        """True in exact mode."""
        return self._engine.target.exactness.enabled

    def facts(self) -> dict[str, Any]:
        """Dtype, device, exact mode, threads; without exact mode also the batch and the draft."""
        import torch

        info = self._engine.target.info
        facts: dict[str, Any] = {
            "family": info.family,
            "dtype": info.dtype,
            "device": info.device,
            "threads": torch.get_num_threads(),
            "exact": self.keeps_partial,
        }
        if not self.keeps_partial:
            facts |= {"batch": self._batch, "draft": self._engine.drafter.name}
        return facts

    def answer(
        self, jobs: Iterable[AnswerJob], on_answer: OnAnswer, on_progress: OnProgress
    ) -> None:
        """Answer; called back as answers finish, in any order.

        Raises:
            KeyboardInterrupt: Passed on; what had not finished by then is dropped.
        """
        form = ChatForm(self._codec())

        def done(task: _Dialogue) -> None:
            on_answer(task.job, task.answer())

        self._drive([_Dialogue(job, form) for job in jobs], done, on_progress)

    def write_questions(
        self, jobs: Sequence[QuestionJob], marks: TurnMarks, on_progress: OnProgress
    ) -> list[WrittenQuestion]:
        """Write questions; they come back in the order of the jobs."""
        tasks = [_Question(job, marks, self._codec()) for job in jobs]
        self._drive(tasks, lambda task: None, on_progress)
        return [task.written() for task in tasks]

    def _codec(self) -> TextCodec:
        codec = self._engine.codec
        if codec is None:
            raise ConfigError(f"{self._engine.target.info.name} has no tokenizer.")
        return codec

    def _fresh(self) -> Engine:
        engine = self._engine
        config = EngineConfig(
            max_batch=self._batch,
            auto_off=self.keeps_partial and engine.config.auto_off,
            memory_limit=engine.config.memory_limit,
            limits=engine.config.limits,
        )
        return Engine(engine.target, drafter=engine.drafter, codec=engine.codec, config=config)

    def _drive(
        self, tasks: Sequence[Any], on_done: Callable[[Any], None], on_progress: OnProgress
    ) -> None:
        """Run tasks, `batch` at a time; answers of one prompt share its prefill."""
        engine = self._fresh()

        def submit(prompt: Prompt, params: SamplingParams) -> ActiveRequest:
            own = params if self.keeps_partial else explicit_params(params, engine)
            (request,) = engine.submit(prompt, own)
            return request

        waiting: deque[_Task] = deque(tasks)
        active: list[_Task] = []
        done, tokens = 0, 0
        try:
            while waiting or active:
                while waiting and len(active) < self._batch:
                    active.append(waiting.popleft())
                    active[-1].begin(submit)
                engine.step()
                for task in list(active):
                    if task.go_on(submit):
                        continue
                    engine.cancel(task.request)
                    active.remove(task)
                    done += 1
                    tokens += task.tokens_before
                    on_done(task)
                running = sum(t.tokens_before + t.request.num_generated for t in active)
                on_progress(done + sum(task.share for task in active), tokens + running)
        finally:
            for task in active:
                engine.cancel(task.request)


@dataclass(slots=True)
class _Dialogue:
    """A job under way: a turn, then the next after its answer."""

    job: AnswerJob
    form: ChatForm
    request: ActiveRequest = field(init=False)
    turns: list[Turn] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    drop: Drop | None = None
    message: str | None = None

    def begin(self, submit: _Submit) -> None:
        prompt = self.form.prompt(self.job.prompt.turns, self.messages)
        seed = self.job.seed(len(self.turns))
        self.request = submit(prompt, replace(self.job.params, seed=seed or 0))

    def go_on(self, submit: _Submit) -> bool:
        request = self.request
        if self.turns and len(request.prompt) > self.job.max_prompt_tokens:
            self.drop = Drop.TOO_LONG
            return False
        if request.phase is not Phase.DONE:
            return True
        result = request.result()
        if result.error is not None:
            self.drop, self.message = Drop.FAILED, result.error
            return False
        asked = self.form.prompt(self.job.prompt.turns, self.messages)
        self.turns.append(
            Turn(
                prompt=self.form.stored(asked),
                prompt_ids=tuple(request.prompt),
                response_ids=tuple(result.token_ids),
                finish=result.finish_reason.value,
                seed=result.seed,
            )
        )
        if len(self.turns) == len(self.job.prompt.turns):
            return False
        said = self.form.codec.assistant_message(result.text, result.token_ids)
        self.messages.append(said)
        self.begin(submit)
        return True

    @property
    def tokens_before(self) -> int:
        return sum(len(turn.response_ids) for turn in self.turns)

    @property
    def share(self) -> float:
        own = self.request.num_generated / self.job.params.max_tokens
        return (len(self.turns) + min(own, 1.0)) / len(self.job.prompt.turns)

    def answer(self) -> Answer:
        return Answer(turns=tuple(self.turns), drop=self.drop, message=self.message)


@dataclass(slots=True)
class _Question:
    """A question under way."""

    job: QuestionJob
    marks: TurnMarks
    codec: TextCodec
    request: ActiveRequest = field(init=False)
    seen: int = 0

    def begin(self, submit: _Submit) -> None:
        stop = () if self.marks.end_token is not None else (self.marks.end_text,)
        self.request = submit(list(self.marks.prefix), replace(self.job.params, stop=stop))

    def go_on(self, submit: _Submit) -> bool:
        """The token that ends a user's turn need not end texts: it is looked for here."""
        fresh = self.request.generated[self.seen :]
        self.seen += len(fresh)
        return self.marks.end_token not in fresh and self.request.phase is not Phase.DONE

    @property
    def tokens_before(self) -> int:
        return self.request.num_generated if self.request.phase is Phase.DONE else 0

    @property
    def share(self) -> float:
        return min(1.0, self.request.num_generated / self.job.params.max_tokens)

    def written(self) -> WrittenQuestion:
        result = self.request.result()
        ids, text, drop = result.token_ids, result.text, None
        if self.marks.end_token in ids:
            ids = ids[: ids.index(self.marks.end_token)]
            text = self.codec.decode(ids)
        elif result.finish_reason is not FinishReason.STOP:
            drop = Drop.FAILED if result.error is not None else Drop.UNFINISHED
        elif self.marks.end_token is not None:
            ids = ids[:-1]  # another end token
        special = set(self.codec.tokenizer.all_special_ids)
        if drop is None and ("\ufffd" in text or special.intersection(ids)):
            drop = Drop.MALFORMED
        return WrittenQuestion(
            index=self.job.index, seed=self.job.params.seed, text=text.strip(), drop=drop
        )
