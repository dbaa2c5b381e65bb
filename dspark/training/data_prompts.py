"""Prompts of a data set: how they are put to the target, and which of them pass the filters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from dspark.errors import CapabilityError, DataError
from dspark.eval.prompts import PromptSet
from dspark.text import TextCodec
from dspark.training.data_filters import (
    Drop,
    DuplicateIndex,
    ExclusionIndex,
    FilterLimits,
    repetition,
    words,
)

__all__ = ["SELF", "AskedPrompt", "ChatForm", "DataPrompt", "PromptSieve", "prompts_of_sets"]

SELF = "self"
"""Source of questions that the target wrote itself."""

AskedPrompt: TypeAlias = str | list[dict[str, Any]]
"""A prompt as the engine takes it: raw text or chat messages."""

_WORDS_REPEATED = 3  # size of the n-grams in a prompt's repetition


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPrompt:
    """A prompt to answer.

    Attributes:
        source: Name of its set, or "self".
        turns: User turns; each but the first follows the target's own answer.
    """

    source: str
    turns: tuple[str, ...]


def prompts_of_sets(sets: Iterable[PromptSet]) -> list[DataPrompt]:
    """The prompts of prompt sets, in order."""
    return [
        DataPrompt(source=prompts.name, turns=question.turns)
        for prompts in sets
        for question in prompts.questions
    ]


class ChatForm:
    """How turns become a prompt: by the chat template, or as raw text where there is none.

    Args:
        codec: The target's text codec.
    """

    def __init__(self, codec: TextCodec) -> None:
        self.codec = codec
        self.is_raw = not codec.has_chat_template

    def prompt(self, turns: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> AskedPrompt:
        """The prompt of the turn after so many answers.

        Args:
            turns: User turns.
            answers: The assistant's messages so far.
        """
        said = list(zip(turns, answers, strict=False))
        now = turns[len(answers)]
        if self.is_raw:
            return "".join(f"{turn}{answer['content']}\n\n" for turn, answer in said) + now
        messages: list[dict[str, Any]] = []
        for turn, answer in said:
            messages += [{"role": "user", "content": turn}, dict(answer)]
        return [*messages, {"role": "user", "content": now}]

    def encode(self, prompt: AskedPrompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            DataError: If it is not valid Unicode, or the template refuses it.
        """
        if isinstance(prompt, str):
            return self.codec.encode(prompt)
        return self.codec.encode_chat(prompt)

    def stored(self, prompt: AskedPrompt) -> AskedPrompt:
        """A prompt as rows hold it: the text of a single user turn, else messages."""
        if isinstance(prompt, str) or len(prompt) > 1:
            return prompt
        return str(prompt[0]["content"])


class PromptSieve:
    """Keeps the prompts that pass all filters, and counts the others.

    Args:
        form: How turns become a prompt.
        limits: What passes.
        excluded: Texts that no prompt may overlap with.

    Attributes:
        kept: Prompts that passed, in order.
        dropped: Source -> reason -> prompts.
    """

    def __init__(self, form: ChatForm, limits: FilterLimits, excluded: Iterable[str] = ()) -> None:
        self._form = form
        self._limits = limits
        self._excluded = ExclusionIndex(excluded)
        self._seen = DuplicateIndex(limits.max_similarity)
        self.kept: list[DataPrompt] = []
        self.dropped: dict[str, Counter[str]] = {}

    def add(self, prompt: DataPrompt) -> Drop | None:
        """Keep a prompt, or tell why not."""
        reason = self._judge(prompt)
        if reason is None:
            self.kept.append(prompt)
        else:
            self.drop(prompt.source, reason)
        return reason

    def drop(self, source: str, reason: Drop) -> None:
        """Count a prompt that was found wanting before."""
        self.dropped.setdefault(source, Counter())[reason.value] += 1

    def _judge(self, prompt: DataPrompt) -> Drop | None:
        text = "\n".join(prompt.turns)
        reason = self._judge_length(prompt, text)
        if reason is not None:
            return reason
        if repetition(words(text), _WORDS_REPEATED) > self._limits.max_repetition:
            return Drop.REPETITIVE
        if any(self._excluded.overlaps(part) for part in {text, *prompt.turns}):
            return Drop.EXCLUDED
        return self._seen.check(text)

    def _judge_length(self, prompt: DataPrompt, text: str) -> Drop | None:
        try:
            whole = self._form.encode(self._form.prompt(prompt.turns, []))
            own = self._form.codec.encode_plain(text)
        except (DataError, CapabilityError, UnicodeError):
            return Drop.MALFORMED
        if len(own) < self._limits.min_prompt_tokens:
            return Drop.TOO_SHORT
        return Drop.TOO_LONG if len(whole) > self._limits.max_prompt_tokens else None
