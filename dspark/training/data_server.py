"""Answers and questions from a server: text, which our tokenizer turns into token ids.

The ids may differ from those the server sampled: several sequences of tokens spell the same text.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from typing import Any, TypeVar

from dspark.errors import ConfigError, DataError
from dspark.request import SamplingParams
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
from dspark.training.data_client import Completion, RefusedError, ServerClient, UnreachableError
from dspark.training.data_filters import Drop
from dspark.training.data_prompts import ChatForm
from dspark.training.data_turns import TurnMarks, answer_end

__all__ = ["ServerAnswerer"]

_FAILURES = 8  # answers in a row that fail before the run stops

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class ServerAnswerer:
    """Asks a server that speaks the OpenAI protocol.

    Args:
        client: The server.
        codec: The target's text codec.
        concurrency: Requests at a time.

    Attributes:
        keeps_partial: True: a server's answers do not depend on our order.
    """

    keeps_partial = True

    def __init__(self, client: ServerClient, codec: TextCodec, *, concurrency: int = 16) -> None:
        if concurrency < 1:
            raise ConfigError(f"concurrency is {concurrency}, but must be >= 1.")
        self._client = client
        self._form = ChatForm(codec)
        self._concurrency = concurrency
        self._end = answer_end(codec)

    def facts(self) -> dict[str, Any]:
        """Nothing is known of the server's engine."""
        return {}

    def answer(
        self, jobs: Iterable[AnswerJob], on_answer: OnAnswer, on_progress: OnProgress
    ) -> None:
        """Answer; called back as answers finish, in any order.

        Answers that fail are passed on once a later one succeeds, so that a server that went away
        costs none: they are asked for again in the next run.

        Raises:
            DataError: If several answers in a row fail.
            CapabilityError: If the server refuses key, model or endpoint.
            KeyboardInterrupt: Passed on; what is under way is dropped.
        """
        failed: list[tuple[AnswerJob, Answer]] = []
        done, tokens = 0, 0
        with closing(_in_threads(self._answer, jobs, self._concurrency)) as answers:
            for job, answer in answers:
                failed.append((job, answer))
                if answer.drop is not Drop.FAILED:
                    for pair in failed:
                        on_answer(*pair)
                    failed.clear()
                elif len(failed) >= _FAILURES:
                    raise _many_failed(len(failed), "answers", answer.message)
                done += 1
                tokens += sum(len(turn.response_ids) for turn in answer.turns)
                on_progress(done, tokens)
        if failed and len(failed) == done:
            raise _many_failed(len(failed), "answers", failed[-1][1].message)
        for pair in failed:
            on_answer(*pair)

    def _answer(self, job: AnswerJob) -> Answer:
        turns: list[Turn] = []
        messages: list[dict[str, Any]] = []
        drop, message = None, None
        try:
            while drop is None and len(turns) < len(job.prompt.turns):
                asked = self._form.prompt(job.prompt.turns, messages)
                prompt_ids = self._form.encode(asked)
                if turns and len(prompt_ids) > job.max_prompt_tokens:
                    drop = Drop.TOO_LONG
                    continue
                seed = job.seed(len(turns))
                found = self._ask(asked, prompt_ids, job.params, seed)
                if found.has_reasoning:
                    drop = Drop.REASONING
                    continue
                turns.append(
                    Turn(
                        prompt=self._form.stored(asked),
                        prompt_ids=tuple(prompt_ids),
                        response_ids=tuple(self._ids(found)),
                        finish=found.finish,
                        seed=seed,
                    )
                )
                messages.append({"role": "assistant", "content": found.text})
        except DataError as exc:  # the template may refuse the server's answer, too
            drop, message = Drop.FAILED, exc.message
        return Answer(turns=tuple(turns), drop=drop, message=message)

    def _ask(
        self, asked: Any, prompt_ids: Sequence[int], params: SamplingParams, seed: int | None
    ) -> Completion:
        sampling = _sampling(params, seed)
        if self._form.is_raw:
            return self._client.complete(prompt_ids, sampling)
        return self._client.chat(asked, sampling)

    def _ids(self, found: Completion) -> list[int]:
        """Token ids of an answer, with the end token that the text does not show."""
        ids = self._form.codec.encode_plain(found.text)
        if found.finish == "stop" and self._end is not None:
            ids.append(self._end)
        return ids

    def write_questions(
        self, jobs: Sequence[QuestionJob], marks: TurnMarks, on_progress: OnProgress
    ) -> list[WrittenQuestion]:
        """Write questions; they come back in the order of the jobs.

        Raises:
            DataError: If several in a row fail.
            CapabilityError: If the server refuses key, model or endpoint.
        """

        def write(job: QuestionJob) -> WrittenQuestion:
            sampling = _sampling(job.params, job.params.seed) | {"stop": [marks.end_text]}
            try:
                found = self._client.complete(marks.prefix, sampling)
            except (RefusedError, UnreachableError) as exc:
                return _question(job, exc.message, Drop.FAILED)
            if found.finish != "stop":
                return _question(job, found.text, Drop.UNFINISHED)
            return _question(job, found.text, Drop.MALFORMED if "\ufffd" in found.text else None)

        written: list[WrittenQuestion] = []
        tokens, failures = 0, 0
        with closing(_in_threads(write, jobs, self._concurrency)) as questions:
            for _, question in questions:
                written.append(question)
                failures = failures + 1 if question.drop is Drop.FAILED else 0
                if failures >= min(_FAILURES, len(jobs)):
                    raise _many_failed(failures, "questions", question.text)
                tokens += len(self._form.codec.encode_plain(question.text))
                on_progress(len(written), tokens)
        return sorted(written, key=lambda question: question.index)


def _many_failed(count: int, what: str, message: str | None) -> DataError:
    return DataError(
        f"{count} {what} in a row failed, the last one because {message}",
        hint="mend the server and run the same command again; what is finished is kept",
    )


def _question(job: QuestionJob, text: str, drop: Drop | None) -> WrittenQuestion:
    return WrittenQuestion(index=job.index, seed=job.params.seed, text=text.strip(), drop=drop)


def _sampling(params: SamplingParams, seed: int | None) -> dict[str, Any]:
    sampling: dict[str, Any] = {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
    }
    return sampling if seed is None else sampling | {"seed": seed}


class _Failure:
    """An error that a thread met, to be raised where results are taken."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _in_threads(
    work: Callable[[_In], _Out], items: Iterable[_In], threads: int
) -> Generator[tuple[_In, _Out], None, None]:
    """Do work in threads; results come as they are ready.

    The threads are daemons: after Ctrl-C the program ends without waiting for answers. When the
    caller stops taking results, no further item is begun.
    """
    todo: queue.SimpleQueue[_In] = queue.SimpleQueue()
    ready: queue.SimpleQueue[tuple[_In, _Out] | _Failure] = queue.SimpleQueue()
    stop = threading.Event()
    count = 0
    for item in items:
        todo.put(item)
        count += 1

    def run() -> None:
        while not stop.is_set():
            try:
                item = todo.get_nowait()
            except queue.Empty:
                return
            try:
                ready.put((item, work(item)))
            except BaseException as exc:  # noqa: BLE001 - raised again by the caller's thread
                ready.put(_Failure(exc))

    for _ in range(min(threads, count)):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in range(count):
            found = ready.get()
            if isinstance(found, _Failure):
                raise found.error
            yield found
    finally:
        stop.set()
