"""What all checks look at: the pair, its settings, the texts and what the draft did on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dspark.errors import ConfigError
from dspark.eval.doctor.patient import Patient
from dspark.eval.doctor.replay import Replay, ReplayConfig
from dspark.eval.doctor.traces import Trace

__all__ = ["DoctorConfig", "Exam"]

_STRIDE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorConfig:
    """How much to look at.

    Attributes:
        max_tokens: Tokens of an answer, >= 8.
        tree_budget: Drafted nodes of a round, >= 1.
        depth: Longest drafted path, >= 1.
        is_quick: Fewer variants and budgets, no measured run.
        is_raw: Prompts without the chat template.
        has_run: Compare the cost model with a measured run.
        max_variants: Mask tokens to try at the most.
        variant_seconds: Seconds that the search of one check may take.
        step_seconds: Seconds to measure steps in; None is 6, or 2 in a quick visit.

    Raises:
        ConfigError: If a value is out of range.
    """

    max_tokens: int = 64
    tree_budget: int = 15
    depth: int = 8
    is_quick: bool = False
    is_raw: bool = False
    has_run: bool = True
    max_variants: int = 24
    variant_seconds: float = 20.0
    step_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 8), ("tree_budget", 1), ("depth", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be >= {least}.")

    @property
    def tree(self) -> ReplayConfig:
        """Rounds as a user has them, one request at a time."""
        return ReplayConfig(budget=self.tree_budget, depth=self.depth, is_single=True)

    @property
    def chain(self) -> ReplayConfig:
        """Rounds of chains, as published figures count them."""
        return ReplayConfig(budget=max(self.depth, 16), depth=max(self.depth, 16), width=1)

    @property
    def strides(self) -> ReplayConfig:
        """Chains at fixed places, for comparing variants."""
        return ReplayConfig(
            budget=self.depth,
            depth=self.depth,
            width=1,
            stride=_STRIDE,
            places=8 if self.is_quick else 20,
        )


@dataclass(slots=True, kw_only=True)
class Exam:
    """The pair on the table.

    Attributes:
        patient: The pair.
        config: How much to look at.
        traces: Texts the target wrote, with the states that the draft and its variants read.
        tree: Rounds of the draft as a user has them.
        chain: Rounds of the trained part, as chains; empty without one.
        strides: The trained part at fixed places; empty without one.
        clock: Seconds of now.
    """

    patient: Patient
    config: DoctorConfig
    traces: list[Trace] = field(default_factory=list)
    tree: Replay = field(default_factory=Replay)
    chain: Replay = field(default_factory=Replay)
    strides: Replay = field(default_factory=Replay)
    clock: Callable[[], float] = time.perf_counter
