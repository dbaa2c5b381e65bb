"""transformers' own `generate` as a runner: plain, with prompt lookup, with an assistant model.

The model is stock: transformers' class, attention and kernels, in the target's dtype. Prompts are
the target's own token ids.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as hf_logging

from dspark.devices import pick_device, pick_dtype
from dspark.errors import ConfigError
from dspark.eval.bench_records import RequestRecord, RunOutput, count_rounds
from dspark.eval.runners.base import (
    Arrivals,
    BenchRequest,
    Progress,
    failure,
    one_sentence,
    token_progress,
)
from dspark.request import SamplingParams

__all__ = ["ASSISTED", "LOOKUP", "PLAIN", "HFRunner", "StockModels"]

PLAIN, LOOKUP, ASSISTED = "plain", "lookup", "assisted"

_LOOKUP_TOKENS = 10
"""Tokens a prompt-lookup candidate has: the number in transformers' own documentation."""

_NOTES = {
    PLAIN: "stock model; above concurrency 1, left-padded batches that start and end together",
    LOOKUP: f"stock model; candidates of {_LOOKUP_TOKENS} tokens",
    ASSISTED: "stock models; transformers' own schedule of the draft's length",
}


class StockModels:
    """Stock models by name, loaded once and shared by the modes of a benchmark.

    Args:
        dtype: As the target runs in, "float32" or "bfloat16".
        device: Where the target runs.

    Raises:
        ConfigError: If the target runs in a form or place that is transformers' alone to know.
    """

    def __init__(self, *, dtype: str, device: str) -> None:
        self._device = pick_device(device)
        self._dtype = pick_dtype(dtype, self._device)
        self._loaded: dict[Path, Any] = {}

    def load(self, spec: str) -> Any:
        """Load a model as transformers runs it.

        Raises:
            CheckpointError: If it cannot be found or read.
        """
        from dspark.adapters.hf.load import load_stock_model
        from dspark.models.resolve import resolve_model

        folder = resolve_model(spec, progress=False)  # another bar is being shown
        if folder not in self._loaded:
            model, _ = load_stock_model(folder, self._dtype, self._device)
            self._loaded[folder] = model.eval()
        return self._loaded[folder]

    def forget(self) -> None:
        """Let go of all models."""
        self._loaded.clear()


class _Clock(BaseStreamer):
    """Notes when the tokens of a batch come.

    Args:
        rows: Prompts in the batch.
        eos: Tokens that end a row; empty if rows go on after them.
        on_tokens: Told how many tokens came.
    """

    def __init__(self, rows: int, eos: frozenset[int], on_tokens: Callable[[int], None]) -> None:
        self.arrivals = [Arrivals() for _ in range(rows)]
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self._ended = [False] * rows
        self._eos = eos
        self._on_tokens = on_tokens
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then every step's tokens: [batch], or [1, n] from assisted decoding."""
        if self._is_prompt:
            self._is_prompt = False
            return
        now = time.perf_counter()
        for row, tokens in enumerate(value.reshape(len(self.arrivals), -1).tolist()):
            if self._ended[row]:
                continue
            end = next((i for i, token in enumerate(tokens) if token in self._eos), None)
            kept = tokens if end is None else tokens[: end + 1]
            self._ended[row] = end is not None
            self.tokens[row].extend(kept)
            self.arrivals[row].add(len(kept), now)
            self._on_tokens(len(kept))

    def end(self) -> None:
        """Nothing to do."""


class HFRunner:
    """`model.generate` in one of its modes.

    Concurrency above 1 is a left-padded batch that starts and ends together, since `generate`
    cannot take in a prompt while others are under way. Lookup and assisted decoding take one
    prompt at a time.

    Args:
        models: Where its models come from.
        target: The target as the user named it.
        params: Sampling parameters.
        eos: The target's end tokens.
        mode: PLAIN, LOOKUP or ASSISTED.
        assistant: The assistant model's name, for ASSISTED.
    """

    is_local = True

    def __init__(
        self,
        models: StockModels,
        target: str,
        params: SamplingParams,
        *,
        eos: Sequence[int],
        mode: str = PLAIN,
        assistant: str | None = None,
    ) -> None:
        self._models = models
        self._target = target
        self._params = params
        self._eos = list(eos)
        self._mode = mode
        self._assistant = assistant
        self._model: Any = None
        self._options: dict[str, Any] = {}
        self.notes: Sequence[str] = (_NOTES[mode],)

    @property
    def library(self) -> Mapping[str, str]:
        """Name and version of the library."""
        return {"name": "transformers", "version": metadata.version("transformers")}

    def refuses(self, concurrency: int) -> str | None:
        """Why not: lookup and assisted decoding take one prompt at a time."""
        if concurrency == 1 or self._mode == PLAIN:
            return None
        return f"transformers' {self._mode} decoding takes one prompt at a time"

    def prepare(self) -> None:
        """Load the stock model, and the assistant.

        Raises:
            CheckpointError: If one cannot be read.
            ConfigError: If the assistant has another vocabulary.
        """
        self._model = self._models.load(self._target)
        # Its own sampling defaults would fill in whatever is not said below.
        self._model.generation_config = _new_config()
        if self._mode == LOOKUP:
            self._options = {"prompt_lookup_num_tokens": _LOOKUP_TOKENS}
        elif self._mode == ASSISTED:
            assistant = self._models.load(str(self._assistant))
            mine, theirs = _vocab_size(self._model), _vocab_size(assistant)
            if mine != theirs:
                raise ConfigError(
                    f"the assistant {self._assistant} has a vocabulary of {theirs} tokens, but "
                    f"the target's has {mine}.",
                    hint="name an assistant made for this target",
                )
            self._options = {"assistant_model": assistant}

    def close(self) -> None:
        """Let go of the models."""
        self._model = None
        self._options = {}
        self._models.forget()

    def run(
        self, requests: Sequence[BenchRequest], concurrency: int, on_progress: Progress
    ) -> RunOutput:
        """Answer all prompts, batch after batch."""
        came = token_progress(len(requests) * self._params.max_tokens, on_progress)
        records: list[RequestRecord] = []
        start = time.perf_counter()
        for first in range(0, len(requests), concurrency):
            records += self._batch(requests[first : first + concurrency], came)
        seconds = time.perf_counter() - start
        return count_rounds(RunOutput(seconds=seconds, requests=tuple(records)))

    def _batch(
        self, requests: Sequence[BenchRequest], on_tokens: Callable[[int], None]
    ) -> list[RequestRecord]:
        eos = frozenset(() if self._params.ignore_eos else self._eos)
        clock = _Clock(len(requests), eos, on_tokens)
        longest = max(len(request.token_ids) for request in requests)
        ids = [[0] * (longest - len(r.token_ids)) + list(r.token_ids) for r in requests]
        mask = [[0] * (longest - len(r.token_ids)) + [1] * len(r.token_ids) for r in requests]
        torch.manual_seed(requests[0].seed)
        try:
            with torch.inference_mode(), _silence():
                self._model.generate(
                    torch.tensor(ids, device=self._model.device),
                    attention_mask=torch.tensor(mask, device=self._model.device),
                    generation_config=self._config(),
                    streamer=clock,
                    **self._options,
                )
        except Exception as exc:  # noqa: BLE001 - whatever breaks in another project's code costs
            # these prompts, never the run.
            error = f"transformers: {type(exc).__name__}: {one_sentence(exc)}"
            return [
                failure(r, error, time.perf_counter() - clock.arrivals[0].sent) for r in requests
            ]
        return [
            arrivals.record(request, token_ids=tokens, has_rounds=True)
            for request, arrivals, tokens in zip(
                requests, clock.arrivals, clock.tokens, strict=True
            )
        ]

    def _config(self) -> Any:
        params = self._params
        sampling: dict[str, Any] = {"do_sample": False}
        if params.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,  # 0 keeps all; left out, transformers would take 50
                "min_p": params.min_p or None,
            }
        return _new_config(
            **sampling,
            max_new_tokens=params.max_tokens,
            pad_token_id=0,  # padding is masked, so any token will do
            eos_token_id=None if params.ignore_eos else self._eos or None,
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Keep transformers from warning of what it passes to itself."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)


def _new_config(**fields: Any) -> Any:
    return GenerationConfig(**fields)  # type: ignore[no-untyped-call]


def _vocab_size(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)
