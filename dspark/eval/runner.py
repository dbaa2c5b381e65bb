"""Ask a model every question of a set and keep what each round did.

Up to `batch` questions are under way at once; a question's next turn follows the model's own answer
to the one before. Nothing that depends on time decides about a draft: auto-off and trimming are
off (`eval_engine`), so acceptance figures of a run are the same on a busy and on an idle machine.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from dspark.active import ActiveRequest, Phase
from dspark.engine import Engine, EngineConfig
from dspark.eval.prompts import Question
from dspark.eval.records import QuestionRecord, TurnRecord
from dspark.request import Prompt, SamplingParams
from dspark.rounds import RoundLimits

__all__ = [
    "Runner",
    "eval_engine",
    "explicit_params",
    "load_drafts",
    "question_seed",
]

Done = Callable[[Question, QuestionRecord], None]
Progress = Callable[[float], None]


def question_seed(seed: int, question_id: str | int, turn: int = 0) -> int:
    """Seed of one turn of one question; independent of the other questions and of their order.

    Args:
        seed: The run's seed.
        question_id: Whose.
        turn: Which turn, from 0.

    Returns:
        0 .. 2**63 - 1.
    """
    text = json.dumps([seed, question_id, turn])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def eval_engine(engine: Engine, *, batch: int) -> Engine:
    """An engine of the same target and drafter for measuring: rounds kept, auto-off off."""
    limits = replace(engine.config.limits, keep_rounds=True)
    config = EngineConfig(max_batch=batch, auto_off=False, limits=limits)
    return Engine(
        engine.target,
        drafter=engine.drafter,
        codec=engine.codec,
        config=config,
        sampling_defaults=engine.sampling_defaults,
    )


def explicit_params(params: SamplingParams, engine: Engine) -> SamplingParams:
    """Fill in the sizes of a tree where they were left open.

    A tree budget that a request does not state may be cut by what rows cost in time.

    Args:
        params: Sampling parameters.
        engine: Whose limits apply.
    """
    limits: RoundLimits = engine.config.limits
    most = engine.target.exactness.max_nodes
    budget = limits.tree_budget if most is None else min(limits.tree_budget, most)
    return replace(
        params,
        tree_budget=budget if params.tree_budget is None else params.tree_budget,
        depth=limits.depth if params.depth is None else params.depth,
    )


def load_drafts(engine: Engine, target: str, draft: str, *, dtype: str, device: str) -> Engine:
    """Give a loaded target another draft.

    Args:
        engine: An engine of the target.
        target: The target as the user named it.
        draft: As --draft.
        dtype: As the target's.
        device: As the target's.

    Returns:
        An engine of the same target object and the new draft.

    Raises:
        DsparkError: If the draft cannot be loaded or does not fit.
    """
    from dspark.loading import build_drafter
    from dspark.models.resolve import resolve_model
    from dspark.registry import LoadedTarget, LoadOptions

    loaded = LoadedTarget(
        target=engine.target,
        codec=engine.codec,
        sampling=engine.sampling_defaults,
        folder=Path(resolve_model(target)),
    )
    drafter = build_drafter(draft, loaded, LoadOptions(name=target, dtype=dtype, device=device))
    return Engine(
        engine.target,
        drafter=drafter,
        codec=engine.codec,
        config=engine.config,
        sampling_defaults=engine.sampling_defaults,
    )


@dataclass(slots=True)
class _Dialogue:
    """A question under way."""

    question: Question
    request: ActiveRequest
    answers: list[TurnRecord] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        failed = bool(self.answers) and self.answers[-1].error is not None
        return failed or len(self.answers) == len(self.question.turns)

    @property
    def progress(self) -> float:
        """Turns done, and the share of the current one that its token limit tells."""
        if self.is_over:
            return float(len(self.question.turns))
        share = self.request.num_generated / self.request.params.max_tokens
        return len(self.answers) + min(share, 1.0)

    def record(self) -> QuestionRecord:
        return QuestionRecord(
            question_id=self.question.question_id,
            category=self.question.category,
            turns=tuple(self.answers),
        )


class Runner:
    """Asks questions.

    Args:
        engine: Made by `eval_engine`.
        params: Sampling parameters; the seed is replaced by each question's own.
        seed: The run's seed.
        is_raw: No chat template: a turn is raw text, a later one goes after what was said before,
            with an empty line between.
    """

    def __init__(
        self, engine: Engine, params: SamplingParams, *, seed: int = 0, is_raw: bool = False
    ) -> None:
        codec = engine.codec
        self._engine = engine
        self._params = params
        self._seed = seed
        self.is_raw = is_raw or codec is None or not codec.has_chat_template

    def run(
        self,
        questions: Iterable[Question],
        *,
        on_done: Done | None = None,
        on_progress: Progress | None = None,
    ) -> list[QuestionRecord]:
        """Ask all questions.

        Args:
            questions: What to ask.
            on_done: Called with every question as it finishes, in the order of finishing.
            on_progress: Called after every round with the turns done since the start, the shares of
                those under way included.

        Returns:
            The records, in the order of the questions. A question that fails has its error in its
            last answer; the others go on.

        Raises:
            KeyboardInterrupt: Passed on; whatever had not finished by then is dropped.
        """
        order = list(questions)
        waiting, active = deque(order), list[_Dialogue]()
        records: dict[str | int, QuestionRecord] = {}
        turns_done = 0.0
        try:
            while waiting or active:
                while waiting and len(active) < self._engine.config.max_batch:
                    question = waiting.popleft()
                    active.append(_Dialogue(question, self._ask(question, [])))
                self._engine.step()
                for dialogue in [d for d in active if d.request.phase is Phase.DONE]:
                    self._answered(dialogue)
                    if not dialogue.is_over:
                        continue
                    active.remove(dialogue)
                    turns_done += dialogue.progress
                    record = records[dialogue.question.question_id] = dialogue.record()
                    if on_done is not None:
                        on_done(dialogue.question, record)
                if on_progress is not None:
                    on_progress(turns_done + sum(d.progress for d in active))
        finally:
            for dialogue in active:
                self._engine.cancel(dialogue.request)
        return [records[question.question_id] for question in order]

    def _answered(self, dialogue: _Dialogue) -> None:
        dialogue.answers.append(TurnRecord.of(dialogue.request.result()))
        if not dialogue.is_over:
            dialogue.request = self._ask(dialogue.question, dialogue.answers)

    def _ask(self, question: Question, answers: list[TurnRecord]) -> ActiveRequest:
        turn = len(answers)
        seed = question_seed(self._seed, question.question_id, turn)
        params = replace(self._params, seed=seed, n=1)
        texts = [answer.text for answer in answers]
        (request,) = self._engine.submit(self._prompt(question, texts), params)
        return request

    def _prompt(self, question: Question, answers: list[str]) -> Prompt:
        said = list(zip(question.turns, answers, strict=False))
        now = question.turns[len(answers)]
        if self.is_raw:
            return "".join(f"{turn}{answer}\n\n" for turn, answer in said) + now
        messages = []
        for turn, answer in said:
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": now}]
