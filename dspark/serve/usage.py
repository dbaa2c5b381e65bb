"""What an answer says of itself: tokens, and what speculation did, in OpenAI's and vLLM's words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dspark.request import GenerationResult, RequestStats

__all__ = ["metrics_json", "progress_usage", "speculation", "usage_json"]


def usage_json(results: Iterable[GenerationResult]) -> dict[str, Any]:
    """`usage` of a request's choices; the tokens of a prompt count once."""
    every = list(results)
    stats = [result.stats for result in every]
    firsts = {r.prompt_index: r.stats for r in sorted(every, key=lambda r: -r.sample_index)}
    prompt = sum(s.prompt_tokens for s in firsts.values())
    output = sum(s.output_tokens for s in stats)
    accepted = sum(s.accepted for s in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {
            "cached_tokens": sum(s.shared_prefix for s in firsts.values()),
        },
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(s.verified for s in stats) - accepted,
        },
    }


def progress_usage(prompt: int, output: int) -> dict[str, Any]:
    """`usage` while an answer is under way."""
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def speculation(stats: Iterable[RequestStats]) -> dict[str, Any]:
    """`metrics.speculative_decoding` in vLLM's form, over all choices.

    A step is a round that had a draft. `acceptance_histogram[k]` counts those that accepted k
    tokens; the mean length has the target's own token in it.
    """
    every = list(stats)
    verified = _by_depth(s.verified_at_depth for s in every)
    accepted = _by_depth(s.accepted_at_depth for s in every)
    steps = verified[0] if verified else 0
    tokens, nodes = sum(accepted), sum(s.verified for s in every)
    reached = [steps, *accepted]
    return {
        "mean_acceptance_length": 1 + tokens / steps if steps else None,
        "draft_acceptance_rate": tokens / nodes if nodes else None,
        "acceptance_histogram": [
            here - beyond for here, beyond in zip(reached, [*accepted, 0], strict=True)
        ],
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": tokens,
        "num_draft_tokens": nodes,
        "num_spec_tokens": len(verified),
    }


def metrics_json(results: Iterable[GenerationResult]) -> dict[str, Any]:
    """`metrics` of a request's choices."""
    every = list(results)
    stats = [result.stats for result in every]
    rounds = sum(s.rounds for s in stats)
    return {
        "speculative_decoding": speculation(stats),
        "dspark": {
            "tau": sum(s.committed for s in stats) / rounds if rounds else None,
            "rounds": rounds,
            "seconds_draft": sum(s.seconds_draft for s in stats),
            "seconds_verify": sum(s.seconds_verify for s in stats),
            "seconds_prefill": sum(s.seconds_prefill for s in stats),
            "seconds_waiting": max((s.seconds_waiting for s in stats), default=0.0),
            "seconds_total": max((s.seconds_total for s in stats), default=0.0),
            "time_to_first_token": max((s.time_to_first_token for s in stats), default=0.0),
            "tokens_per_second": decoding_speed(stats),
            "seeds": _seeds(every),
        },
    }


def decoding_speed(stats: Iterable[RequestStats]) -> float | None:
    """Tokens per second of rounds, of this request's share of its batches; None before any."""
    every = list(stats)
    seconds = sum(s.seconds_draft + s.seconds_verify + s.seconds_rest for s in every)
    return sum(s.committed for s in every) / seconds if seconds > 0 else None


def _seeds(results: Iterable[GenerationResult]) -> Mapping[int, str] | None:
    """The seed of every prompt's noise, as text since it may have 64 bits; None if greedy."""
    seeds = {r.prompt_index: str(r.seed) for r in results if r.seed is not None}
    return seeds or None


def _by_depth(lists: Iterable[list[int]]) -> list[int]:
    out: list[int] = []
    for own in lists:
        out += [0] * (len(own) - len(out))
        for depth, value in enumerate(own):
            out[depth] += value
    return out
