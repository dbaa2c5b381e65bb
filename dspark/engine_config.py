"""Settings of an engine, and of a request's place among others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from dspark.errors import ConfigError
from dspark.payoff import StepSeconds
from dspark.round_limits import RoundLimits
from dspark.verify.scheduler_setting import Schedule

__all__ = ["EngineConfig", "priorities"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of an engine.

    Attributes:
        max_batch: Requests in a round at the most; further ones wait.
        memory_limit: Bytes of the target's K/V cache, None for no limit. A draft model's own
            cache comes on top. Where memory runs out, the request that is last in order gives up
            its part and is run again later.
        ageing: Rounds of waiting that count as much as twice the priority, >= 0: a request of
            priority 2 stands in line as if it had come so many rounds earlier.
        auto_off: Let drafting switch itself off per request while it loses.
        limits: Sizes of a round.
        schedule: Which drafted nodes are verified where a request states no tree budget of its
            own: "auto", "early-stop", "global", "async", "threshold:0.3", "fixed:8" or "off"
            (docs/scheduling.md).
        step_seconds: What a forward of so many rows takes over so long a context, measured
            beforehand; None learns it while the engine runs.

    Raises:
        ConfigError: If a value is out of range.
    """

    max_batch: int = 32
    memory_limit: int | None = None
    ageing: int = 64
    auto_off: bool = True
    limits: RoundLimits = field(default_factory=RoundLimits)
    schedule: str = "auto"
    step_seconds: StepSeconds | None = None

    def __post_init__(self) -> None:
        Schedule.parse(self.schedule)
        if self.max_batch < 1:
            raise ConfigError(f"max_batch is {self.max_batch}, but must be >= 1.")
        if self.memory_limit is not None and self.memory_limit < 1:
            raise ConfigError(f"memory_limit is {self.memory_limit}, but must be >= 1 byte.")
        if self.ageing < 0:
            raise ConfigError(f"ageing is {self.ageing}, but must be >= 0 rounds.")


def priorities(priority: float | Sequence[float], count: int) -> list[float]:
    """One checked priority per prompt.

    Args:
        priority: For all prompts, or one for each; finite, > 0.
        count: Prompts.

    Raises:
        ConfigError: If their number or a value is out of range.
    """
    each = [priority] * count if isinstance(priority, int | float) else list(priority)
    if len(each) != count:
        raise ConfigError(
            f"{len(each)} priorities were given for {count} prompts, but one for all or one for "
            "each is needed."
        )
    bad = next((p for p in each if not 0 < p < math.inf), None)
    if bad is not None:
        raise ConfigError(f"priority is {bad}, but must be a finite number > 0.")
    return each
