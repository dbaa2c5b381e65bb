"""What a simulated server does: where drafts come from, and which of their nodes it verifies."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.errors import ConfigError
from dspark.verify.scheduler_setting import Schedule, ScheduleKind

__all__ = ["JOINT", "Policy", "parse_policy"]

JOINT = (
    ScheduleKind.AUTO,
    ScheduleKind.EARLY_STOP,
    ScheduleKind.GLOBAL,
    ScheduleKind.ASYNC,
)
"""Schedules that go by what rows cost."""

_SHORT = {
    "mtp-1": ("mtp", "fixed:1"),
    "dspark": ("chain", "early-stop"),
    "tree": ("tree", "global"),
}
_FORMS = "plain, mtp-1, fixed:N, dspark, tree, chain:SCHEDULE or tree:SCHEDULE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A way to serve.

    Attributes:
        name: As the user wrote it.
        source: Where drafts come from: "mtp", "chain" or "tree"; None decodes plainly.
        schedule: Which of their nodes are verified.
        skips: Do not draft for requests whose last proposals held no node that pays
            (`dspark.payoff.FirstNode`).
    """

    name: str
    source: str | None
    schedule: Schedule
    skips: bool = False

    @property
    def is_joint(self) -> bool:
        """True if it goes by what rows cost."""
        return self.source is not None and self.schedule.kind in JOINT

    @property
    def stops(self) -> bool:
        """True if it stops at the first node that does not pay."""
        return self.schedule.kind is ScheduleKind.EARLY_STOP


def parse_policy(text: str, *, skips: bool = True) -> Policy:
    """Read a policy.

    Args:
        text: "plain"; "mtp-1" (a chain of one by the MTP source); "fixed:N" (chains of N); "dspark"
            (chain:early-stop); "tree" (tree:global); or a source and a schedule, such as
            "chain:global", "tree:async", "chain:threshold:0.4".
        skips: Whether schedules that go by cost may leave out drafting.

    Raises:
        ConfigError: If it is none of these.
    """
    if text == "plain":
        return Policy(name=text, source=None, schedule=Schedule(ScheduleKind.OFF))
    source, colon, rest = text.partition(":")
    if text in _SHORT:
        source, rest = _SHORT[text]
    elif source == "fixed":
        source, rest = "chain", text
    elif source not in ("chain", "tree") or not colon:
        raise ConfigError(f"the policy {text!r} is not known: it must be {_FORMS}.")
    schedule = Schedule.parse(rest)
    is_joint = schedule.kind in JOINT
    return Policy(name=text, source=source, schedule=schedule, skips=skips and is_joint)
