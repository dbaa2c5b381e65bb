"""Definitions: the words of a report, those alone that stand on its page."""

from __future__ import annotations

from collections.abc import Iterator

from dspark.eval.report.page import Term
from dspark.eval.report.read import Inputs

__all__ = ["method", "terms"]

_ROUND = (
    Term(
        name="round",
        meaning="One draft, one verification by the target, one commit. It commits the accepted "
        "tokens and a closing token of the target's own, or fewer where the text ends in it.",
    ),
    Term(
        name="tau",
        meaning="Committed tokens / rounds, closing tokens included. The token that prefill yields "
        "does not count. Plain decoding has tau 1. Rounds without a draft count.",
    ),
    Term(
        name="accept_len",
        meaning="Drafted tokens that were accepted in a round, closing token not included.",
    ),
)
_ACCEPTANCE = (
    Term(
        name="three means",
        meaning="The same rounds give three averages of the tokens L that a round commits. Tau is "
        "the mean over rounds: sum of L / rounds. Per request: mean over answers of their own tau. "
        "Per token: sum of L² / sum of L, the mean over tokens of the L of their round. "
        "accept_len is averaged in the same three ways.",
    ),
    Term(
        name="95 % of tau",
        meaning="Percentile bootstrap over prompts, 2000 draws: prompts are drawn with all of "
        "their rounds, since the rounds of one answer are alike.",
    ),
    Term(
        name="conditional acceptance",
        meaning="Of the rounds that came to a candidate at a depth, the share that accepted one "
        "there. Only this one shows how a draft decays along its length.",
    ),
    Term(
        name="unconditional acceptance",
        meaning="Of all rounds, the share that accepted a token at a depth.",
    ),
    Term(
        name="verify rate",
        meaning="Committed tokens / rows that the target ran: drafted nodes and anchors.",
    ),
    Term(name="fully accepted", meaning="Drafted rounds accepted down to the depth of their tree."),
    Term(name="wasted per token", meaning="Drafted nodes not accepted / committed tokens."),
)
_SPEED = (
    Term(
        name="throughput",
        meaning="Output tokens of all answers / wall-clock seconds of the run; the median of the "
        "repeats.",
    ),
    Term(
        name="tok/s per user",
        meaning="Output tokens of an answer / seconds from sending its prompt to its last token; "
        "the median over prompts, then over repeats.",
    ),
    Term(
        name="speed-up",
        meaning="Throughput / the baseline's in the same repeat; the median of the repeats. Its "
        "interval: 95 %, percentile bootstrap, 2000 resamples of prompts and repeats, the same "
        "draw for both sides. An interval with 1 in it does not tell the two apart. It covers the "
        "prompts and the minutes of the run, and nothing else.",
    ),
    Term(name="concurrency", meaning="Requests that are under way at the same time."),
    Term(
        name="time to first token (TTFT)",
        meaning="From sending a request to its first token, prefill and waiting included.",
    ),
    Term(
        name="time between tokens, between chunks",
        meaning="The tokens of a round arrive together, as a chunk. Between chunks: the gap that a "
        "reader sees. Between tokens: that gap / tokens of the chunk, once for each of them. "
        "Percentiles are over all answers of all repeats.",
    ),
    Term(
        name="same text",
        meaning="Answers with the tokens of the baseline's, of those whose rule promises it: both "
        "of dspark, greedy or with the same noise.",
    ),
)
_STEPS = (
    Term(
        name="verification step",
        meaning="One forward of the target over so many rows (anchors and drafted nodes), after so "
        "many tokens of context. Steps per second are 1 / the median of its time.",
    ),
)
_SIMULATED = (
    Term(
        name="simulated",
        meaning="Rounds were played through, not run: their seconds come from measured or computed "
        "step times, their outcomes from recorded or stated acceptance.",
    ),
    Term(
        name="verification budget",
        meaning="Drafted nodes verified / rounds of requests.",
    ),
    Term(
        name="simulated speed per user",
        meaning="Tokens committed by rounds / seconds that requests spent in rounds after their "
        "prefill.",
    ),
)
_AUDIT = (
    Term(
        name="audit",
        meaning="Passed: drafted tokens were judged and nothing was found. Found: loss. "
        "Inconclusive: it ran, but proves nothing. Power: what a check would have caught at a "
        "chance of 90 %.",
    ),
)
_RULES = (
    Term(
        name="rule",
        meaning="How drafted tokens are accepted. Greedy: the target's likeliest token. Coupled: "
        "the target's own draw under noise that the drafter knows. Sample-match: the same, "
        "unknown to the drafter. Rejection: with probability min(1, target / draft), else a "
        "draw from the residual. Block: as rejection, a chain judged as a whole. The law of the "
        "output is the target's under each.",
    ),
    Term(
        name="exact mode",
        meaning="Every row of a forward is bitwise what it would be alone, so output with a draft "
        "equals plain output token by token. Without it, rounding may turn numeric ties.",
    ),
)


def terms(inputs: Inputs) -> tuple[Term, ...]:
    """The definitions that the files of a report need."""
    found: list[Term] = []
    if inputs.eval or inputs.bench:
        found += _ROUND
    if inputs.eval:
        found += _ACCEPTANCE
        found += _confidence(inputs)
    if inputs.bench:
        found += _SPEED
    if inputs.profile:
        found += _STEPS
    if inputs.simulate:
        found += _SIMULATED
    if inputs.audit:
        found += _AUDIT
    return (*found, *_RULES)


def _confidence(inputs: Inputs) -> Iterator[Term]:
    found = [
        cell.confidence
        for file in inputs.eval
        for cell in file.results.configurations
        if cell.confidence is not None
    ]
    if not found:
        return
    bins = " or ".join(str(n) for n in sorted({quality.bins for quality in found}))
    yield Term(
        name="survival",
        meaning="The probability, by the drafter's own account, that verification comes to a node "
        "and accepts it. Judged is the tree's likeliest chain, against whether it was accepted "
        "down to there. Step: survival / the parent's, in rounds that accepted the parent.",
    )
    yield Term(
        name="ECE",
        meaning=f"Expected calibration error: predictions go into {bins} bins of equal width; the "
        "mean over bins of |mean prediction - share that came true|, weighted by how many are in "
        "each. 0 is best.",
    )
    yield Term(
        name="AUROC, Brier",
        meaning="AUROC: the chance that one that came true had the higher prediction, ties half; "
        "0.5 is guessing. Brier: mean squared error of the predictions; 0 is best.",
    )


def method(inputs: Inputs) -> tuple[str, ...]:
    """How the figures came about, a sentence or two per kind of file."""
    found = []
    if inputs.eval:
        found.append(
            "Acceptance was counted with auto-off and trimming switched off and a fixed tree, so "
            "it does not depend on how busy the machine was. Each question has a seed of its own."
        )
    if inputs.bench:
        found.append(
            "Speed was measured by wall clock. Configurations took turns within each repeat, so "
            "that a slow minute of the machine falls on all of them. Medians are shown, and no "
            "repeat was left out."
        )
    if inputs.profile:
        found.append("Step times are medians of repeated forwards; nothing is smoothed or fitted.")
    if inputs.simulate:
        found.append(
            "Serving was simulated: its figures are predictions under the assumptions told."
        )
    if inputs.audit:
        found.append(
            "The audit ran the engine's own code on the loaded pair of target and draft, against "
            "plain decoding and against the target's law."
        )
    return tuple(found)
