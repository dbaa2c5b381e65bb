"""Acceptance figures from the raw log. Every mean carries its name in full.

A round commits L = accept_len + 1 tokens, or fewer where the text ends in it. The same rounds give
three averages of L, and other engines print one or another of them without saying which:

    per round    sum of L / rounds                  what tau is everywhere in dspark
    per request  mean over requests of their own tau
    per token    sum of L * L / sum of L            mean over committed tokens of the L of the
                                                    round that committed them

Position k is depth k of the tree, from 1.

    unconditional(k)  rounds that accepted a token at depth k / rounds
    conditional(k)    rounds that accepted one at depth k / rounds that came to a candidate there
    of_offered(k)     rounds that accepted one at depth k / rounds whose tree was k deep

All of them end with the text: what an accepted path holds beyond an end token does not count.

**Source:** vllm issue 42690 (per request against per token), 56101 (tokens beyond the end); the
unconditional rate is what vLLM's `spec_decode_num_accepted_tokens_per_pos` / drafts prints.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dspark.errors import ConfigError
from dspark.eval.records import QuestionRecord, TurnRecord, all_rounds, all_turns
from dspark.request import RoundStats

__all__ = [
    "CONTEXT_EDGES",
    "Means",
    "PositionRate",
    "acceptance",
    "bootstrap_tau",
    "by_category",
    "by_context",
    "check_edges",
    "means",
    "per_position",
]

CONTEXT_EDGES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Where context-length buckets end by default, in tokens."""

_RESAMPLES = 2000


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """One quantity of rounds, averaged in three ways; None where there is nothing to average.

    Attributes:
        per_round: Mean over rounds.
        per_token: Mean over committed tokens of the value of the round that committed them.
        per_request: Mean over requests of their means over rounds.
    """

    per_round: float | None
    per_token: float | None
    per_request: float | None


def means(turns: Sequence[TurnRecord], value: Callable[[RoundStats], int]) -> Means:
    """Average a quantity of rounds in all three ways.

    Args:
        turns: Requests; those without a round count nowhere.
        value: The quantity.
    """
    total = tokens = rounds = weighted = 0
    own = []
    for turn in turns:
        values = [value(item) for item in turn.rounds]
        committed = [item.committed for item in turn.rounds]
        if not values:
            continue
        total, rounds, tokens = total + sum(values), rounds + len(values), tokens + sum(committed)
        weighted += sum(v * c for v, c in zip(values, committed, strict=True))
        own.append(sum(values) / len(values))
    return Means(
        per_round=_ratio(total, rounds),
        per_token=_ratio(weighted, tokens),
        per_request=_ratio(sum(own), len(own)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionRate:
    """Acceptance at one depth.

    Attributes:
        position: Depth, from 1.
        accepted: Rounds that accepted a token there.
        reached: Rounds that came to a candidate there.
        offered: Rounds whose tree was that deep.
        unconditional: accepted / rounds.
        conditional: accepted / reached.
        of_offered: accepted / offered.
    """

    position: int
    accepted: int
    reached: int
    offered: int
    unconditional: float | None
    conditional: float | None
    of_offered: float | None


def per_position(rounds: Sequence[RoundStats]) -> list[PositionRate]:
    """Acceptance by depth, as deep as any tree went."""
    rates = []
    for k in range(1, max((item.depth for item in rounds), default=0) + 1):
        accepted = sum(item.accepted >= k for item in rounds)
        # The block rule looks at the whole chain at once, so what was tried does not say it all.
        reached = sum(item.tried >= k and item.accepted >= k - 1 for item in rounds)
        offered = sum(item.depth >= k for item in rounds)
        rates.append(
            PositionRate(
                position=k,
                accepted=accepted,
                reached=reached,
                offered=offered,
                unconditional=_ratio(accepted, len(rounds)),
                conditional=_ratio(accepted, reached),
                of_offered=_ratio(accepted, offered),
            )
        )
    return rates


def bootstrap_tau(
    records: Sequence[QuestionRecord], *, resamples: int = _RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """95 % confidence interval of tau: percentile bootstrap over prompts.

    Prompts are drawn with replacement, each with all of its rounds: rounds of one answer are alike,
    so drawing rounds would make the interval too narrow.

    Args:
        records: Questions.
        resamples: Draws.
        seed: Seed of the draws.

    Returns:
        (low, high), or None with fewer than two prompts that ran rounds.
    """
    rows = [
        (sum(t.committed for t in ts), sum(len(t.rounds) for t in ts)) for ts in _turns(records)
    ]
    pairs = np.array([row for row in rows if row[1]], dtype=np.float64)
    if len(pairs) < 2:
        return None
    picks = np.random.default_rng(seed).integers(0, len(pairs), size=(resamples, len(pairs)))
    sums = pairs[picks].sum(axis=1)  # [resamples, 2]
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return float(low), float(high)


def _turns(records: Sequence[QuestionRecord]) -> list[list[TurnRecord]]:
    return [all_turns([record]) for record in records]


def acceptance(records: Sequence[QuestionRecord]) -> dict[str, Any]:
    """All acceptance figures of a set of questions, as they stand in result files.

    Args:
        records: Questions; answers that failed count nowhere.

    Returns:
        JSON values; see docs/eval.md for every key.
    """
    turns, rounds = all_turns(records), all_rounds(records)
    verified = sum(item.verified for item in rounds)
    accepted = sum(item.accepted for item in rounds)
    committed = sum(item.committed for item in rounds)
    drafted = [item for item in rounds if item.verified]
    interval = bootstrap_tau(records)
    deepest = max((item.accepted for item in rounds), default=0)
    tau = means(turns, lambda item: item.committed)
    return {
        "prompts": sum(bool(ts) for ts in _turns(records)),
        "requests": len(turns),
        "output_tokens": sum(turn.output_tokens for turn in turns),
        "rounds": len(rounds),
        "rounds_drafted": len(drafted),
        "proposed": sum(item.proposed for item in rounds),
        "verified": verified,
        "accepted": accepted,
        "committed": committed,
        "tau": tau.per_round,
        "tau_ci95": None if interval is None else list(interval),
        "tau_means": asdict(tau),
        "accept_len_means": asdict(means(turns, lambda item: item.accepted)),
        "accept_len_histogram": [
            sum(item.accepted == length for item in rounds) for length in range(deepest + 1)
        ],
        "full_acceptance": _ratio(
            sum(item.accepted == item.depth for item in drafted), len(drafted)
        ),
        "acceptance_rate": _ratio(accepted, verified),
        "verify_rate": _ratio(committed, verified + len(rounds)),
        "wasted_per_token": _ratio(verified - accepted, committed),
        "per_position": [asdict(rate) for rate in per_position(rounds)],
    }


def by_category(records: Sequence[QuestionRecord]) -> dict[str, dict[str, Any]]:
    """The figures of each category, in order of appearance."""
    groups: dict[str, list[QuestionRecord]] = {}
    for record in records:
        groups.setdefault(record.category, []).append(record)
    return {name: acceptance(group) for name, group in groups.items()}


def check_edges(edges: Sequence[int]) -> None:
    """Refuse context buckets that make no sense.

    Raises:
        ConfigError: If the edges do not rise from 1 or more.
    """
    if any(low >= high for low, high in itertools.pairwise([0, *edges])):
        raise ConfigError(f"context buckets end at {list(edges)}, but must be rising and >= 1.")


def by_context(
    records: Sequence[QuestionRecord], edges: Sequence[int] = CONTEXT_EDGES
) -> list[dict[str, Any]]:
    """Tau and accept_len by the context a round started from, the anchor included.

    Args:
        records: Questions.
        edges: Where buckets end, in tokens, rising; a last one without an end follows.

    Returns:
        One entry per bucket that has rounds. A length with fewer than five prompts says little.

    Raises:
        ConfigError: If the edges do not rise from 1 or more.
    """
    check_edges(edges)
    bounds = [0, *edges]
    rounds: list[list[RoundStats]] = [[] for _ in bounds]
    prompts: list[set[str | int]] = [set() for _ in bounds]
    for record in records:
        for turn in all_turns([record]):
            for context, item in zip(turn.contexts, turn.rounds, strict=True):
                at = int(np.searchsorted(edges, context, side="right"))
                rounds[at].append(item)
                prompts[at].add(record.question_id)
    return [
        {
            "from": low,
            "to": high,
            "prompts": len(asked),
            "rounds": len(found),
            "tau": _ratio(sum(item.committed for item in found), len(found)),
            "accept_len": _ratio(sum(item.accepted for item in found), len(found)),
        }
        for low, high, asked, found in zip(bounds, [*edges, None], prompts, rounds, strict=True)
        if found
    ]
