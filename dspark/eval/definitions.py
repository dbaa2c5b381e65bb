"""Other projects' definitions of acceptance, computed on our rounds, each under its own name.

They differ in whether the closing token counts, in what happens to the round in which the text
ends, and in what is averaged. So each function follows its source to the letter, and notes say
where a run differs from what the source would have run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dspark.errors import ConfigError
from dspark.eval.records import QuestionRecord, all_rounds
from dspark.request import RoundStats, Rule, SamplingParams

__all__ = ["DEFINITIONS", "apply_definition", "check_definition", "deepspec", "specbench", "vllm"]


def _is_cut(item: RoundStats) -> bool:
    """True if the text ended inside the accepted path, so that no closing token was added."""
    return item.committed <= item.path


def deepspec(records: Sequence[QuestionRecord]) -> dict[str, Any]:
    """DeepSpec's result row.

    A round's acceptance length is accepted + 1, and just accepted where an accepted token ends the
    text; its proposal ends there, too. Positions count from 0, as its table does. Its proposals are
    chains: of a tree, the depth stands for the proposal's length.

    **Source:** deepseek-ai/DeepSpec, `deepspec/eval/base_evaluator.py`: `verify_draft_tokens`,
    `allreduce_response_metrics`, `build_metrics_row`.
    """
    rounds = all_rounds(records)
    accepted = [item.accepted for item in rounds]
    acceptance = [item.accepted + (not _is_cut(item)) for item in rounds]
    proposal = [item.accepted if _is_cut(item) else item.depth for item in rounds]
    count = len(rounds)
    rates = []
    for k in range(max(proposal, default=0)):
        offered = sum(length > k for length in proposal)
        rates.append(sum(length > k for length in accepted) / offered if offered else None)
    return {
        "num_samples": sum(len(record.turns) for record in records),
        "proposal_count": count,
        "draft_tokens_per_proposal": sum(proposal) / count if count else 0.0,
        "acceptance_length": sum(acceptance) / count if count else 0.0,
        "verify_rate": sum(acceptance) / (sum(proposal) + count) if count else 0.0,
        "accept_rates_by_position": rates,
    }


def specbench(records: Sequence[QuestionRecord]) -> dict[str, Any]:
    """Spec-Bench's "#Mean accepted tokens".

    The plain mean over all steps of all rows of the accepted tokens with the closing token, the
    last step of an answer counted as if the text had not ended in it.

    **Source:** hemingkx/Spec-Bench, `evaluation/speed.py: speed`; the lists it reads are those of
    `evaluation/eval.py`, made before the output is cut.
    """
    lengths = [item.path + 1 for item in all_rounds(records)]
    return {
        "mean_accepted_tokens": sum(lengths) / len(lengths) if lengths else None,
        "steps": len(lengths),
    }


def vllm(records: Sequence[QuestionRecord]) -> dict[str, Any]:
    """Counters of vLLM, and what its benchmark derives from them.

    Only rounds with a draft count; accepted tokens beyond the end of a text do (issue 56101).

    **Source:** vLLM 0.33, `v1/spec_decode/metrics.py`: 1 + accepted / drafts, accepted / draft
    tokens, accepted per position / drafts.
    """
    rounds = [item for item in all_rounds(records) if item.verified]
    drafts, tokens = len(rounds), sum(item.verified for item in rounds)
    accepted = sum(item.path for item in rounds)
    deepest = max((item.depth for item in rounds), default=0)
    return {
        "spec_decode_num_drafts": drafts,
        "spec_decode_draft_tokens": tokens,
        "spec_decode_accepted_tokens": accepted,
        "spec_decode_acceptance_rate": accepted / tokens if tokens else None,
        "spec_decode_acceptance_length": 1 + accepted / drafts if drafts else None,
        "spec_decode_per_position_acceptance_rates": [
            sum(item.path > k for item in rounds) / drafts for k in range(deepest)
        ],
    }


DEFINITIONS: dict[str, Callable[[Sequence[QuestionRecord]], dict[str, Any]]] = {
    "deepspec": deepspec,
    "specbench": specbench,
    "vllm": vllm,
}
"""Definitions by the name under which they are asked for."""


def check_definition(name: str, params: SamplingParams) -> SamplingParams:
    """Make sure that figures under a definition can compare.

    DeepSpec accepts by the rejection rule; where the caller left the rule open it is set.

    Args:
        name: A key of DEFINITIONS.
        params: Sampling parameters of the run.

    Returns:
        The parameters to run with.

    Raises:
        ConfigError: If there is no such definition, or its source runs under another rule.
    """
    if name not in DEFINITIONS:
        raise ConfigError(f"definition is {name!r}, but must be one of {', '.join(DEFINITIONS)}.")
    if name != "deepspec" or params.temperature == 0 or params.rule == Rule.REJECTION.value:
        return params
    if params.rule == "auto":
        return replace(params, rule=Rule.REJECTION.value)
    raise ConfigError(
        f"definition 'deepspec' was asked for with rule {params.rule!r}, but DeepSpec accepts by "
        "the rejection rule.",
        hint="use --rule rejection, or leave out --definition deepspec",
    )


def apply_definition(
    name: str, records: Sequence[QuestionRecord], params: SamplingParams
) -> dict[str, Any]:
    """A definition's figures, with notes on what its source would have run otherwise.

    Args:
        name: A key of DEFINITIONS.
        records: Questions.
        params: Sampling parameters of the run.

    Returns:
        JSON values; `notes` is empty if the figures compare as they stand.
    """
    rounds = all_rounds(records)
    notes = []
    if name == "deepspec":
        if any(item.verified != item.depth for item in rounds):
            notes.append("DeepSpec verifies chains, this run verified trees")
        if params.temperature != 1 or params.top_k or params.top_p < 1 or params.min_p > 0:
            notes.append("DeepSpec's published rows are at temperature 1 without top-k or top-p")
        if any(len(record.turns) > 1 for record in records):
            notes.append("DeepSpec asks the first turn only")
    elif name == "specbench" and params.temperature > 0:
        notes.append("Spec-Bench's published rows are greedy")
    return {**DEFINITIONS[name](records), "notes": notes}
