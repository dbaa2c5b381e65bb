"""Sizes of a round."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.errors import ConfigError

__all__ = ["RoundLimits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundLimits:
    """Sizes of a round.

    Attributes:
        tree_budget: Nodes per request and round where the request does not say.
        depth: Longest drafted path where the request does not say.
        max_rows: Tree rows of a forward, over all requests; budgets shrink to fit.
        prefill_chunk: Prompt tokens of a forward, over all requests.
        keep_rounds: Keep a log of rounds in each request's statistics.
    """

    tree_budget: int = 15
    depth: int = 8
    max_rows: int = 64
    prefill_chunk: int = 512
    keep_rounds: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("tree_budget", 0),
            ("depth", 1),
            ("max_rows", 1),
            ("prefill_chunk", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value}, but must be >= {least}.")
