"""Answers to make: what is asked, with which seed, and what becomes of the outcome.

An answer depends on the run's seed, its prompt's number, the temperature and which answer of the
prompt it is, and on nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dspark.errors import ConfigError
from dspark.request import SamplingParams
from dspark.training.data_filters import Drop, FilterLimits, repetition
from dspark.training.data_prompts import AskedPrompt, DataPrompt
from dspark.training.data_shards import Row
from dspark.training.data_turns import TurnMarks

__all__ = [
    "Answer",
    "AnswerJob",
    "AnswerPlan",
    "Answerer",
    "OnAnswer",
    "OnProgress",
    "QuestionJob",
    "Turn",
    "WrittenQuestion",
    "derive_seed",
    "rows_of",
]

_TOKENS_REPEATED = 4  # size of the n-grams in an answer's repetition


def derive_seed(*parts: str | float) -> int:
    """A seed that depends on all parts, 0 .. 2**31 - 1: what every server takes."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerJob:
    """A prompt to answer once; one row per user turn.

    Attributes:
        index: Number among all jobs.
        prompt: The prompt.
        prompt_index: Its number.
        response: Which answer to the prompt at this temperature, from 0.
        params: Sampling parameters without a seed.
        run_seed: The run's seed.
        max_prompt_tokens: A later turn's prompt that is longer ends the job.
    """

    index: int
    prompt: DataPrompt
    prompt_index: int
    response: int
    params: SamplingParams
    run_seed: int
    max_prompt_tokens: int

    def seed(self, turn: int) -> int | None:
        """Seed of a turn; None for greedy decoding, which has none."""
        if self.params.temperature == 0:
            return None
        key = (self.prompt_index, self.params.temperature, self.response, turn)
        return derive_seed(self.run_seed, "answer", *key)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPlan:
    """Which answers a data set holds: every prompt at every temperature.

    Attributes:
        temperatures: All different. At 0 there is one answer per prompt: others would equal it.
        top_p: Nucleus at temperatures over 0.
        max_tokens: Tokens of an answer at the most.
        responses: Answers per prompt at every temperature over 0.
        seed: The run's seed.

    Raises:
        ConfigError: If a value is outside its range, or a temperature is given twice.
    """

    temperatures: tuple[float, ...] = (0.0, 0.8)
    top_p: float = 0.95
    max_tokens: int = 400
    responses: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperatures:
            raise ConfigError("there is no temperature, but one is needed.")
        twice = [t for t, count in Counter(self.temperatures).items() if count > 1]
        if twice:
            raise ConfigError(
                f"temperature {twice[0]:g} was given twice.",
                hint="for several answers to a prompt use --responses",
            )
        if self.responses < 1:
            raise ConfigError(f"responses is {self.responses}, but must be >= 1.")
        for temperature in self.temperatures:
            self.params(temperature)

    def params(self, temperature: float) -> SamplingParams:
        """Sampling parameters at a temperature, without a seed."""
        top_p = self.top_p if temperature > 0 else 1.0
        return SamplingParams(
            max_tokens=self.max_tokens, temperature=float(temperature), top_p=top_p
        )

    def _kinds(self) -> list[tuple[SamplingParams, int]]:
        """Parameters and number of every answer to a prompt."""
        return [
            (self.params(temperature), response)
            for temperature in self.temperatures
            for response in range(self.responses if temperature > 0 else 1)
        ]

    def count(self, prompts: int) -> int:
        """How many jobs so many prompts make."""
        return prompts * len(self._kinds())

    def jobs(
        self, prompts: Sequence[DataPrompt], start: int, stop: int, *, max_prompt_tokens: int
    ) -> list[AnswerJob]:
        """The jobs of a shard; all answers to a prompt follow each other.

        Args:
            prompts: All prompts.
            start: First job.
            stop: One past the last; may be over the end.
            max_prompt_tokens: A later turn's prompt that is longer ends the job.
        """
        kinds = self._kinds()
        jobs = []
        for index in range(start, min(stop, len(prompts) * len(kinds))):
            number, kind = divmod(index, len(kinds))
            params, response = kinds[kind]
            jobs.append(
                AnswerJob(
                    index=index,
                    prompt=prompts[number],
                    prompt_index=number,
                    response=response,
                    params=params,
                    run_seed=self.seed,
                    max_prompt_tokens=max_prompt_tokens,
                )
            )
        return jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One answered turn.

    Attributes:
        prompt: As rows hold it.
        prompt_ids: Tokens of the prompt, template included.
        response_ids: Tokens of the answer, its end token included.
        finish: "stop" or "length".
        seed: The seed used, None for greedy decoding.
    """

    prompt: AskedPrompt
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    finish: str
    seed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a job.

    Attributes:
        turns: The turns that were answered.
        drop: Why the next one was not, or None.
        message: What went wrong with it, for people.
    """

    turns: tuple[Turn, ...]
    drop: Drop | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionJob:
    """A question for the target to write.

    Attributes:
        index: Its number.
        params: Sampling parameters, seed included.
    """

    index: int
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenQuestion:
    """A question the target wrote.

    Attributes:
        index: Number of its job.
        seed: Its seed.
        text: The text, without whitespace around it.
        drop: Why it cannot be used, or None.
    """

    index: int
    seed: int | None
    text: str
    drop: Drop | None = None


OnAnswer = Callable[[AnswerJob, Answer], None]
OnProgress = Callable[[float, int], None]
"""Told the jobs done (shares of those under way included) and the tokens made, since the start."""


class Answerer(Protocol):
    """Makes answers, and writes questions."""

    @property
    def keeps_partial(self) -> bool:
        """True if an answer does not depend on what else is under way."""
        ...

    def facts(self) -> dict[str, Any]:
        """What decides about answers besides the settings, for the manifest."""
        ...

    def answer(
        self, jobs: Iterable[AnswerJob], on_answer: OnAnswer, on_progress: OnProgress
    ) -> None:
        """Answer; called back as answers finish, in any order."""
        ...

    def write_questions(
        self, jobs: Sequence[QuestionJob], marks: TurnMarks, on_progress: OnProgress
    ) -> list[WrittenQuestion]:
        """Write questions; they come back in the order of the jobs."""
        ...


def rows_of(job: AnswerJob, answer: Answer, limits: FilterLimits) -> tuple[list[Row], Counter[str]]:
    """The rows that pass, and why the others do not.

    Args:
        job: What was asked.
        answer: What came of it.
        limits: What passes.

    Returns:
        Rows in the order of the turns, and dropped turns by reason.
    """
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    if answer.drop is not None:
        dropped[answer.drop.value] += 1
    for turn in answer.turns:
        reason = _judge(turn.response_ids, limits)
        if reason is not None:
            dropped[reason.value] += 1
            continue
        rows.append(
            {
                "source": job.prompt.source,
                "temperature": job.params.temperature,
                "top_p": job.params.top_p,
                "seed": turn.seed,
                "prompt": turn.prompt,
                "prompt_ids": list(turn.prompt_ids),
                "response_ids": list(turn.response_ids),
                "finish": turn.finish,
            }
        )
    return rows, dropped


def _judge(response: Sequence[int], limits: FilterLimits) -> Drop | None:
    if len(response) < limits.min_tokens:
        return Drop.ANSWER_TOO_SHORT
    if repetition(response, _TOKENS_REPEATED) > limits.max_answer_repetition:
        return Drop.ANSWER_REPETITIVE
    return None
