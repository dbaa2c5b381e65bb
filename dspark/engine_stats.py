"""What an engine has done since it was made."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EngineStats"]


@dataclass(slots=True)
class EngineStats:
    """Counts over all requests of an engine.

    Attributes:
        rounds: Forwards of the target.
        rows: Rows of these forwards.
        experts_chosen: Experts that rows chose, over all layers and forwards without prompt rows;
            0 for targets without experts, or that cannot tell.
        experts_woken: The distinct ones of a layer, over the same: what had to be read.
        submitted: Requests submitted, one per sample.
        finished: Requests that ended by themselves.
        cancelled: Requests that were cancelled.
        failed: Requests that ended in an error.
        preemptions: Times a request had to give its memory to others.
        recomputed_tokens: Tokens that were run again because of that.
        seconds_waiting: Seconds that requests spent in the queue, of those that left it.
    """

    rounds: int = 0
    rows: int = 0
    experts_chosen: int = 0
    experts_woken: int = 0
    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    seconds_waiting: float = 0.0
