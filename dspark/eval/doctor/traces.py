"""Texts that the target wrote by itself, with its hidden states: what replays run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dspark.engine import Engine, EngineConfig
from dspark.errors import DataError
from dspark.request import Prompt, SamplingParams
from dspark.target import BatchPart, Target, TokenBatch
from dspark.text import TextCodec

__all__ = ["Trace", "add_states", "write_traces"]

_CHUNK = 512  # rows of a prefill forward


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """A prompt and the answer that plain greedy decoding of the target gives.

    Attributes:
        question_id: Whose.
        category: Of the question.
        tokens: Prompt and answer.
        prompt_length: How many of them are the prompt.
        states: Hidden states of the target by layer (dspark/target.py), [len(tokens), D]: row i is
            that of position i. Empty until `add_states`.
    """

    question_id: str | int
    category: str
    tokens: tuple[int, ...]
    prompt_length: int
    states: dict[int, Tensor] = field(default_factory=dict)

    @property
    def answer(self) -> tuple[int, ...]:
        """The answer's tokens."""
        return self.tokens[self.prompt_length :]


def write_traces(
    target: Target,
    codec: TextCodec | None,
    asked: Sequence[tuple[str | int, str, Prompt]],
    *,
    max_tokens: int,
    on_done: Callable[[int], None] | None = None,
) -> list[Trace]:
    """Have the target answer, plainly and greedily.

    Args:
        target: The target.
        codec: Its text codec, None for prompts of token ids.
        asked: Question id, category and prompt of each.
        max_tokens: Tokens of an answer at the most.
        on_done: Told how many answers are finished.

    Returns:
        Traces of the answers with at least two tokens.

    Raises:
        DataError: If no prompt could be answered.
    """
    engine = Engine(target, codec=codec, config=EngineConfig(max_batch=max(1, len(asked))))
    requests = []
    finished = 0
    for index, (_, _, prompt) in enumerate(asked):
        params = SamplingParams(max_tokens=max_tokens, tree_budget=0)
        requests += engine.submit(prompt, params, prompt_index=index)
    while engine.num_unfinished:
        engine.step()
        done = sum(request.finish_reason is not None for request in requests)
        if done > finished and on_done is not None:
            on_done(done)
        finished = done
    traces = []
    for (question_id, category, _), request in zip(asked, requests, strict=True):
        if request.error is None and request.num_generated > 1:
            traces.append(
                Trace(
                    question_id=question_id,
                    category=category,
                    tokens=tuple(request.tokens),
                    prompt_length=len(request.prompt),
                )
            )
    if not traces:
        errors = [request.error for request in requests if request.error is not None]
        raise DataError(
            f"the target answered none of {len(asked)} prompts: "
            f"{errors[0] if errors else 'every answer ended at once.'}"
        )
    return traces


@torch.inference_mode()
def add_states(target: Target, traces: Sequence[Trace], layers: Sequence[int]) -> list[Trace]:
    """Run traces through the target once more and keep what these layers yield.

    Args:
        target: The target.
        traces: Traces.
        layers: Layers as `Target.forward` takes them.

    Returns:
        The same traces with states of these layers.
    """
    if not layers:
        return list(traces)
    cache = target.new_cache()
    filled = []
    for trace in traces:
        slot, _ = cache.open([])
        parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for start in range(0, len(trace.tokens), _CHUNK):
            tokens = trace.tokens[start : start + _CHUNK]
            cache.reserve(slot, len(tokens))
            part = BatchPart.chain(slot, tokens, start, want_last=False)
            output = target.forward(TokenBatch.build([part]), cache, capture=tuple(layers))
            cache.commit(slot, range(len(tokens)))
            for layer in layers:
                parts[layer].append(output.hidden[layer])
        cache.release(slot)
        states = {layer: torch.cat(rows) for layer, rows in parts.items()}
        filled.append(replace(trace, states=states))
    return filled
