"""What a data set is made of: prompt sets, questions of the target's own, answers, filters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dspark.errors import ConfigError
from dspark.eval.prompts import PromptSet
from dspark.eval.results import describe_prompts
from dspark.request import SamplingParams
from dspark.text import TextCodec, vocabulary_fingerprint
from dspark.training.data_answers import AnswerPlan
from dspark.training.data_filters import FilterLimits
from dspark.training.data_target import template_fingerprint

__all__ = ["DataSpec", "SelfPlan"]

_RETOKENISED = (
    "the answers came as text from a server; response_ids are what the tokenizer makes of it and "
    "may differ from the tokens that were sampled"
)
_RAW = "the target has no chat template: prompts are raw text"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfPlan:
    """Questions that the target writes itself.

    Attributes:
        count: Questions that must pass the filters; 0 for none.
        temperature: >= 0.
        max_tokens: Tokens of a question at the most; one that is longer is dropped.

    Raises:
        ConfigError: If a value is outside its range.
    """

    count: int = 0
    temperature: float = 1.0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"self is {self.count}, but must be >= 0.")
        SamplingParams(max_tokens=self.max_tokens, temperature=self.temperature)
        if self.count > 1 and self.temperature == 0:
            raise ConfigError(
                "self_temperature is 0, but then every question would be the same one.",
                hint="use a temperature near 1",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """What a data set is made of.

    Attributes:
        target: What `describe_target` says.
        sets: Prompt sets to answer.
        excluded: Prompt sets that no prompt may overlap with.
        own: Questions of the target's own.
        plan: Which answers to make.
        limits: What passes.
        shard_rows: Answers of a shard before the filters.
        think: Thinking asked for, forbidden, or None.
        effort: Effort asked for, or None.
        server: `url` and `url_model` if a server answers, else None.

    Raises:
        ConfigError: If there is nothing to answer, or a shard would be empty.
    """

    target: dict[str, Any]
    sets: tuple[PromptSet, ...] = ()
    excluded: tuple[PromptSet, ...] = ()
    own: SelfPlan = field(default_factory=SelfPlan)
    plan: AnswerPlan = field(default_factory=AnswerPlan)
    limits: FilterLimits = field(default_factory=FilterLimits)
    shard_rows: int = 500
    think: bool | None = None
    effort: str | None = None
    server: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.sets and not self.own.count:
            raise ConfigError(
                "there is nothing to answer.",
                hint="give --prompts FILE, or --self N for questions that the target writes",
            )
        if self.shard_rows < 1:
            raise ConfigError(f"shard_rows is {self.shard_rows}, but must be >= 1.")

    def begun(self, codec: TextCodec) -> dict[str, Any]:
        """The sections of the manifest that are known before the first answer."""
        settings: dict[str, Any] = {
            "seed": self.plan.seed,
            "temperature": list(self.plan.temperatures),
            "top_p": self.plan.top_p,
            "max_tokens": self.plan.max_tokens,
            "responses": self.plan.responses,
            "self": self.own.count,
            "self_temperature": self.own.temperature,
            "self_max_tokens": self.own.max_tokens,
            **asdict(self.limits),
            "shard_rows": self.shard_rows,
            "think": self.think,
            "effort": self.effort,
        }
        notes = [_RETOKENISED] if self.server is not None else []
        return {
            "target": self.target,
            "tokenizer": vocabulary_fingerprint(codec),
            "template": template_fingerprint(codec),
            "settings": settings,
            "prompts": [describe_prompts(prompts) for prompts in self.sets],
            "exclude": [describe_prompts(prompts) for prompts in self.excluded],
            "server": self.server,
            "notes": notes if codec.has_chat_template else [*notes, _RAW],
        }
