"""Run one call of generate on the engine, and give back what transformers would.

Rows run ahead of each other in the engine. Tokens are handed over column by column, as plain
decoding makes them: a column is complete when every unfinished row has its token. Then stopping
criteria and streamer are called with what they would get from transformers, once per column and in
that order, so criteria that keep state, or look at the whole batch, work as they are.

Letters: B rows, T columns of the prompt, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput

from dspark.active import ActiveRequest, Phase
from dspark.engine import Engine
from dspark.errors import CapabilityError, DataError
from dspark.hf.call import Call, check_call
from dspark.hf.processed import ProcessedRow
from dspark.hf.processors import ProcessorPlan, plan_processors
from dspark.hf.refusal import Refusal
from dspark.hf.session import Session
from dspark.request import SamplingParams

__all__ = ["decode"]


def decode(session: Session, call: Call) -> Tensor | GenerateDecoderOnlyOutput:
    """Run a call.

    Args:
        session: What is kept for the model.
        call: The call.

    Returns:
        int64 [B, T + new tokens], or transformers' output class around it.

    Raises:
        Refusal: If dspark cannot run it; nothing was given to the streamer or to processors and
            criteria that keep state.
        CapabilityError: If the model cannot be tree-verified.
        ConfigError: If the draft does not fit the model.
        DataError: If a row fails after it gave tokens.
    """
    padding = check_call(call)
    plan = plan_processors(call.processors, padding, do_sample=bool(call.config.do_sample))
    with session.engine_of(call.model) as (engine, target):
        requests = _submit(engine, call, plan, padding)
        try:
            rows = [
                ProcessedRow(request, _ids(call, row, 0, padding[row]), plan.for_row(row))
                for row, request in enumerate(requests)
            ]
            with target.processing(rows):
                sequences = _Columns(engine, call, requests).run()
            session.stats = [request.result().stats for request in requests]
        finally:
            for request in requests:
                engine.cancel(request)
    if not call.config.return_dict_in_generate:
        return sequences
    return _with_scores(call, sequences)


def _ids(call: Call, row: int, start: int, stop: int) -> tuple[int, ...]:
    return tuple(call.input_ids[row, start:stop].tolist())


def _submit(
    engine: Engine, call: Call, plan: ProcessorPlan, padding: list[int]
) -> list[ActiveRequest]:
    """One request per row; the samples of one prompt share its prefill."""
    batch, length = call.input_ids.shape
    samples = int(call.config.num_return_sequences or 1)
    prompts = range(0, batch, samples)
    # The seed is drawn as sampled tokens would be, from torch's generator; greedy draws none.
    seeds = [0] * len(prompts)
    if call.config.do_sample:
        seeds = torch.randint(2**63 - 1, (len(prompts),)).tolist()
    requests: list[ActiveRequest] = []
    for row, seed in zip(prompts, seeds, strict=True):
        params = SamplingParams(
            max_tokens=call.max_new_tokens, n=samples, seed=seed, ignore_eos=True, **plan.params
        )
        requests += engine.submit(list(_ids(call, row, padding[row], length)), params)
    failed = next((request.error for request in requests if request.error is not None), None)
    if failed is not None:
        for request in requests:
            engine.cancel(request)
        raise Refusal(f"its prompt: {failed}")
    return requests


class _Columns:
    """Hands tokens over column by column.

    Args:
        engine: The engine.
        call: The call.
        requests: One per row.
    """

    def __init__(self, engine: Engine, call: Call, requests: list[ActiveRequest]) -> None:
        self._engine = engine
        self._call = call
        self._requests = requests
        self._end_tokens = call.end_tokens
        self._seen = [0] * len(requests)  # generated tokens looked through for end tokens

    def run(self) -> Tensor:
        """Generate until the criteria end every row; int64 [B, T + new tokens]."""
        call, ids, streamer = self._call, self._call.input_ids, self._call.streamer
        unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
        for column in range(call.max_new_tokens):
            tokens = self._column(column, unfinished)
            if column == 0 and streamer is not None:
                streamer.put(call.input_ids.cpu())
            ids = torch.cat([ids, tokens[:, None]], dim=-1)
            unfinished = unfinished & ~call.criteria(ids, None)
            if streamer is not None:
                streamer.put(tokens.cpu())
            if not bool(unfinished.any()):
                break
        if streamer is not None:
            streamer.end()
        return ids

    def _column(self, column: int, unfinished: Tensor) -> Tensor:
        """The next token of every row, int64 [B]; padding where a row is finished."""
        if self._end_tokens is None:
            tokens = self._tokens(column, [True] * len(self._requests))
            return torch.tensor(tokens, device=unfinished.device)
        wanted = [bool(row) for row in unfinished.tolist()]
        for request, is_wanted in zip(self._requests, wanted, strict=True):
            if not is_wanted:
                self._engine.cancel(request)
        fresh = torch.tensor(self._tokens(column, wanted), device=unfinished.device)
        pad = self._call.config._pad_token_tensor.to(unfinished.device)
        padded: Tensor = fresh * unfinished + pad * (1 - unfinished)
        return padded

    def _tokens(self, column: int, wanted: list[bool]) -> list[int]:
        """One token per row, 0 for rows that are not wanted."""
        tokens = [0] * len(wanted)
        for row in (row for row, is_wanted in enumerate(wanted) if is_wanted):
            request = self._requests[row]
            while request.num_generated <= column and request.phase is not Phase.DONE:
                self._step(column)
            if request.num_generated <= column:
                self._fail(request, column)
            tokens[row] = request.tokens[len(request.prompt) + column]
        return tokens

    def _step(self, column: int) -> None:
        """Run a round, and let rows that have their end token go, however far the others are."""
        try:
            self._engine.step()
        except CapabilityError as exc:
            if column == 0:
                raise
            raise DataError(exc.message, hint=exc.hint) from exc
        if not self._end_tokens:
            return
        for row, request in enumerate(self._requests):
            start = len(request.prompt) + self._seen[row]
            self._seen[row] = request.num_generated
            if not self._end_tokens.isdisjoint(request.tokens[start:]):
                self._engine.cancel(request)

    def _fail(self, request: ActiveRequest, column: int) -> None:
        error = request.error or "it ended early."
        if column == 0:
            raise Refusal(f"a row that failed: {error}")
        raise DataError(error, hint=request.hint)


def _with_scores(call: Call, sequences: Tensor) -> GenerateDecoderOnlyOutput:
    """Put scores, logits and a cache around finished sequences, by one plain forward over them.

    The forward is the user's own model, the processors are transformers' own: what comes out is
    what plain decoding of these tokens would have computed, up to rounding.
    """
    config, length = call.config, int(call.input_ids.shape[1])
    count = int(sequences.shape[1]) - length
    wants_logits = config.output_scores or config.output_logits
    past = call.inputs.get("past_key_values")
    scores: Any = () if config.output_scores else None
    raw: Any = () if config.output_logits else None
    if wants_logits or past is not None:
        logits = _forward(call, sequences[:, :-1], past, count if wants_logits else 1)
        for step in range(count if wants_logits else 0):
            row = logits[:, step].to(copy=True, dtype=torch.float32, device=sequences.device)
            if scores is not None:
                scores += (call.processors(sequences[:, : length + step], row.clone()),)
            if raw is not None:
                raw += (row,)
    ids: Any = sequences
    return GenerateDecoderOnlyOutput(sequences=ids, scores=scores, logits=raw, past_key_values=past)


def _forward(call: Call, ids: Tensor, past: Any, keep: int) -> Tensor:
    """Logits of the last `keep` columns, [B, keep, V]; fills the cache."""
    model: GenerationMixin = call.model
    mask = call.inputs.get("attention_mask")
    if mask is not None:
        more = mask.new_ones(mask.shape[0], ids.shape[1] - mask.shape[1])
        mask = torch.cat([mask, more], dim=-1)
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    else:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    device = call.model.device
    output = model(  # type: ignore[operator]
        input_ids=ids.to(device),
        attention_mask=None if mask is None else mask.to(device),
        position_ids=positions.to(device),
        past_key_values=past,
        use_cache=past is not None,
        logits_to_keep=keep,
    )
    logits: Tensor = output.logits
    return logits
