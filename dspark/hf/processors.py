"""Which logits processors become sampling parameters, which run on the nodes, which neither.

transformers applies a list in order. The end of that list which means the same as dspark's own
parameters, in dspark's order, becomes parameters: the drafter then knows them too. What stands
before it runs as it is on the target's logits (processed.py), which needs processors that are
functions of one row's tokens and scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from dspark.hf.refusal import Refusal

__all__ = ["STATELESS_MARK", "ProcessorPlan", "plan_processors"]

STATELESS_MARK = "dspark_stateless"
"""Attribute by which a processor of one's own says that it depends on its arguments alone, row by
row."""

_PURE = (
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.TemperatureLogitsWarper,
    hf.RepetitionPenaltyLogitsProcessor,
    hf.TopPLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopHLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.NoRepeatNGramLogitsProcessor,
    hf.SequenceBiasLogitsProcessor,
    hf.NoBadWordsLogitsProcessor,
    hf.PrefixConstrainedLogitsProcessor,
    hf.ForcedBOSTokenLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.InfNanRemoveLogitsProcessor,
    hf.ExponentialDecayLengthPenalty,
    hf.LogitNormalization,
    hf.SuppressTokensAtBeginLogitsProcessor,
    hf.SuppressTokensLogitsProcessor,
)
"""transformers' own that depend on one row's tokens and scores alone (two of them after
`ProcessorPlan.for_row` has bound them to their row)."""


@dataclass(frozen=True, slots=True, eq=False)
class ProcessorPlan:
    """What becomes of a list of processors.

    Attributes:
        params: Fields of SamplingParams.
        on_nodes: Processors that run on the target's logits, in order.
    """

    params: dict[str, Any]
    on_nodes: tuple[Any, ...]

    def for_row(self, row: int) -> LogitsProcessorList:
        """The processors on nodes as one row of the batch needs them."""
        return LogitsProcessorList([_bind(processor, row) for processor in self.on_nodes])


def plan_processors(
    processors: Sequence[Any], padding: Sequence[int], *, do_sample: bool
) -> ProcessorPlan:
    """Decide what becomes of each processor.

    Args:
        processors: In the order in which they act.
        padding: Left padding of every row, in tokens.
        do_sample: False for greedy decoding, which scaling and truncation do not change.

    Returns:
        The plan.

    Raises:
        Refusal: If one cannot run on the nodes of a tree.
    """
    start, params = len(processors), {}
    rank = 6
    for place in range(len(processors) - 1, -1, -1):
        known = _as_parameter(processors[place], padding)
        if known is None or known[0] >= rank:
            break
        rank, start = known[0], place
        params.update(known[1])
    on_nodes = tuple(processors[:start])
    for processor in on_nodes:
        if type(processor) not in _PURE and not getattr(processor, STATELESS_MARK, False):
            raise Refusal(
                f"{type(processor).__name__}: a processor that may keep state cannot run on the "
                f"nodes of a tree (one that does not says so by an attribute {STATELESS_MARK})."
            )
    if not do_sample:
        penalty = params.get("repetition_penalty", 1.0)
        params = {"repetition_penalty": penalty, "temperature": 0.0}
    else:
        params.setdefault("temperature", 1.0)
    return ProcessorPlan(params, on_nodes)


def _as_parameter(
    processor: Any, padding: Sequence[int]
) -> tuple[int, dict[str, float | int]] | None:
    """A processor's place in dspark's order and its parameter, None if it has none."""
    make = _PARAMETERS.get(type(processor))
    return None if make is None else make(processor, padding)


_Known = tuple[int, dict[str, float | int]] | None


def _repetition(processor: Any, padding: Sequence[int]) -> _Known:
    ignored = processor.prompt_ignore_length
    if ignored is None:
        ignored = 0
    if isinstance(ignored, torch.Tensor):
        skips_padding = ignored.tolist() == list(padding)
    else:
        skips_padding = ignored == 0 and not any(padding)
    return (1, {"repetition_penalty": float(processor.penalty)}) if skips_padding else None


def _temperature(processor: Any, padding: Sequence[int]) -> _Known:
    return 2, {"temperature": float(processor.temperature)}


def _top_k(processor: Any, padding: Sequence[int]) -> _Known:
    is_plain = processor.filter_value == -float("inf")
    return (3, {"top_k": int(processor.top_k)}) if is_plain else None


def _top_p(processor: Any, padding: Sequence[int]) -> _Known:
    is_plain = processor.filter_value == -float("inf") and processor.min_tokens_to_keep == 1
    is_plain = is_plain and processor.top_p > 0
    return (4, {"top_p": float(processor.top_p)}) if is_plain else None


def _min_p(processor: Any, padding: Sequence[int]) -> _Known:
    is_plain = processor.filter_value == -float("inf") and processor.min_tokens_to_keep == 1
    return (4, {"min_p": float(processor.min_p)}) if is_plain else None


def _normalise(processor: Any, padding: Sequence[int]) -> _Known:
    return 5, {}  # a law is the same before and after


_PARAMETERS: dict[type, Callable[[Any, Sequence[int]], _Known]] = {
    hf.RepetitionPenaltyLogitsProcessor: _repetition,
    hf.TemperatureLogitsWarper: _temperature,
    hf.TopKLogitsWarper: _top_k,
    hf.TopPLogitsWarper: _top_p,
    hf.MinPLogitsWarper: _min_p,
    hf.LogitNormalization: _normalise,
}


def _bind(processor: Any, row: int) -> Any:
    """A processor that knows which row of the batch it works on, without seeing the others."""
    if type(processor) is hf.RepetitionPenaltyLogitsProcessor:
        ignored = processor.prompt_ignore_length
        if isinstance(ignored, torch.Tensor):
            return hf.RepetitionPenaltyLogitsProcessor(processor.penalty, int(ignored[row]))
    if type(processor) is hf.PrefixConstrainedLogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn
        return hf.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
    return processor
