"""What steps cost, for an engine that is being loaded: a kept profile, or a quick one made now."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from dspark.errors import DsparkError
from dspark.eval.profile_costs import costs_of
from dspark.eval.profile_measure import quick_profile
from dspark.eval.profile_store import keep_profile, key_of, load_profile
from dspark.payoff import StepSeconds
from dspark.target import Target

if TYPE_CHECKING:
    from dspark.text import TextCodec

__all__ = ["kept_or_quick"]

logger = logging.getLogger(__name__)


def kept_or_quick(
    target: Target,
    codec: TextCodec | None = None,
    expert_memory: int | None = None,
    *,
    note: Callable[[str], None] = logger.info,
) -> StepSeconds | None:
    """What steps of a target cost, for `dspark.Engine.load(step_costs=...)`.

    A profile that was kept for this target, machine and setting is taken; `dspark profile` makes a
    thorough one. Without one, a quick one is measured, which takes two seconds or a few steps, and
    kept.

    Args:
        target: The target as it is loaded.
        codec: Its text codec.
        expert_memory: Bytes that its routed experts are held to.
        note: Told in one line that something is measured; by default the log, level INFO.

    Returns:
        For `EngineConfig.step_seconds`; None if the target cannot be measured.
    """
    profile = load_profile(target, expert_memory=expert_memory)
    if profile is None:
        name = target.info.name
        note(f"measuring what a step of {name} costs, once; dspark profile does it thoroughly")
        try:
            profile = quick_profile(target, codec=codec)
        except DsparkError as exc:  # the engine learns its costs while it runs, then
            logger.warning("what a step of %s costs cannot be measured: %s", name, exc.message)
            return None
        keep_profile(replace(profile, key=key_of(target, expert_memory=expert_memory)))
    return costs_of(profile)
