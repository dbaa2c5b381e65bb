"""Schedules as users name them, and which rules allow them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from dspark.errors import ConfigError
from dspark.request import Rule

__all__ = ["Schedule", "ScheduleKind"]


class ScheduleKind(StrEnum):
    """How nodes are admitted."""

    AUTO = "auto"
    EARLY_STOP = "early-stop"
    GLOBAL = "global"
    ASYNC = "async"
    THRESHOLD = "threshold"
    FIXED = "fixed"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule as a user names it.

    Attributes:
        kind: AUTO: each request by its rule, early stop for rejection and block, else global.
            EARLY_STOP: Algorithm 1 for all. GLOBAL: the optimum; not for rejection and block.
            ASYNC: every request has the budget that it was worth two rounds ago. THRESHOLD: nodes
            whose survival reaches `value`. FIXED: the best `value` nodes of every request. OFF:
            all that is drafted.
        value: Of THRESHOLD, in (0, 1], and of FIXED, a whole number >= 0; else 0.
    """

    kind: ScheduleKind = ScheduleKind.AUTO
    value: float = 0.0

    @property
    def asks_costs(self) -> bool:
        """True if it goes by what a step costs."""
        return self.kind not in (ScheduleKind.THRESHOLD, ScheduleKind.FIXED, ScheduleKind.OFF)

    @staticmethod
    def parse(text: str) -> Schedule:
        """Read "auto", "early-stop", "global", "async", "threshold:0.3", "fixed:8" or "off".

        Raises:
            ConfigError: If it is none of these, or its number is out of range.
        """
        name, colon, number = text.partition(":")
        kind = next((kind for kind in ScheduleKind if kind.value == name), None)
        if kind is not None and bool(colon) == (kind in _WITH_VALUE):
            value = _number(number) if colon else 0.0
            if not colon or _WITH_VALUE[kind](value):
                return Schedule(kind, value)
        raise ConfigError(
            f"schedule is {text!r}, but must be auto, early-stop, global, async, off, threshold:S "
            "with S in (0, 1] or fixed:N with N a whole number >= 0."
        )

    def check(self, rule: Rule) -> None:
        """Refuse what would change the law of a request's output.

        Raises:
            ConfigError: If the rule draws from laws and the schedule is global.
        """
        if self.kind is ScheduleKind.GLOBAL and rule.draws_from_laws:
            raise ConfigError(
                f"schedule is 'global' with rule {rule.value!r}, but whether a node is verified "
                "may not depend on its own token under that rule.",
                hint="use schedule auto, early-stop or async, or rule coupled",
            )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


_WITH_VALUE: dict[ScheduleKind, Callable[[float], bool]] = {
    ScheduleKind.THRESHOLD: lambda value: 0 < value <= 1,
    ScheduleKind.FIXED: lambda value: 0 <= value < math.inf and value == int(value),
}
