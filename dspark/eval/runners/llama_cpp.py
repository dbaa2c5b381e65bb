"""llama.cpp, through its Python binding, as a runner: plain and with its prompt lookup.

The binding decodes one sequence at a time. It yields tokens one by one, also those that one forward
accepted together; where a draft is in use, the calls of it tell the forwards apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from dspark.errors import CapabilityError, CheckpointError, ConfigError
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

__all__ = ["LlamaCppRunner"]

_PACKAGE = "llama-cpp-python"
_LOOKUP_TOKENS = 10
_SEEDS = 1 << 32


class _CountedDraft:
    """A draft of the binding's that counts its calls: one before every forward but the prefill.

    Args:
        draft: The binding's own draft.
    """

    def __init__(self, draft: Callable[..., Any]) -> None:
        self._draft = draft
        self.calls = 0

    def __call__(self, input_ids: Any, /, **options: Any) -> Any:
        self.calls += 1
        return self._draft(input_ids, **options)


class LlamaCppRunner:
    """A GGUF file run by llama.cpp.

    Args:
        path: The file.
        params: Sampling parameters.
        vocab_size: Tokens the target's vocabulary has; prompts are its token ids.
        eos: The target's end tokens.
        context: Tokens of the longest prompt and its answer.
        threads: CPU threads.
        has_lookup: Draft with its prompt lookup.
    """

    is_local = True

    def __init__(
        self,
        path: Path,
        params: SamplingParams,
        *,
        vocab_size: int,
        eos: Sequence[int],
        context: int,
        threads: int,
        has_lookup: bool = False,
    ) -> None:
        self._path = path
        self._params = params
        self._vocab_size = vocab_size
        self._eos = frozenset(() if params.ignore_eos else eos)
        self._context = context
        self._threads = threads
        self._has_lookup = has_lookup
        self._draft: _CountedDraft | None = None
        self._model: Any = None
        self.notes: Sequence[str] = (f"weights of {path.name}, as they are quantised there",)

    @property
    def library(self) -> Mapping[str, str] | None:
        """Name and version of the binding, None if it is not installed."""
        try:
            return {"name": _PACKAGE, "version": metadata.version(_PACKAGE)}
        except metadata.PackageNotFoundError:
            return None

    def refuses(self, concurrency: int) -> str | None:
        """Why not: the binding decodes one sequence."""
        return None if concurrency == 1 else "llama.cpp's Python binding takes one prompt at a time"

    def prepare(self) -> None:
        """Load the file.

        Raises:
            CapabilityError: If the binding is not installed.
            CheckpointError: If the file cannot be loaded.
            ConfigError: If its vocabulary is not the target's.
        """
        try:
            import llama_cpp
            from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
        except ImportError as exc:
            raise CapabilityError(
                "the runner llama.cpp was asked for, but the package llama-cpp-python is not "
                "installed.",
                hint="pip install llama-cpp-python",
            ) from exc
        if self._has_lookup:
            lookup = LlamaPromptLookupDecoding(num_pred_tokens=_LOOKUP_TOKENS)
            self._draft = _CountedDraft(lookup)
        try:
            self._model = llama_cpp.Llama(
                model_path=str(self._path),
                n_ctx=self._context + _LOOKUP_TOKENS,
                n_threads=self._threads,
                n_threads_batch=self._threads,
                n_gpu_layers=-1,
                logits_all=self._has_lookup,  # a draft's tokens are judged by their own logits
                draft_model=self._draft,
                verbose=False,
            )
        except (ValueError, RuntimeError, OSError) as exc:
            raise CheckpointError(
                f"llama.cpp cannot load {self._path.name}: {one_sentence(exc)}"
            ) from exc
        theirs = int(self._model.n_vocab())
        if theirs != self._vocab_size:
            raise ConfigError(
                f"{self._path.name} has a vocabulary of {theirs} tokens, but the target's has "
                f"{self._vocab_size}.",
                hint="name a GGUF file of the target",
            )

    def close(self) -> None:
        """Let go of the model."""
        if self._model is not None:
            self._model.close()
        self._model = None

    def run(
        self, requests: Sequence[BenchRequest], concurrency: int, on_progress: Progress
    ) -> RunOutput:
        """Answer the prompts one after the other."""
        came = token_progress(len(requests) * self._params.max_tokens, on_progress)
        start = time.perf_counter()
        records = [self._answer(request, came) for request in requests]
        seconds = time.perf_counter() - start
        return count_rounds(RunOutput(seconds=seconds, requests=tuple(records)))

    def _answer(self, request: BenchRequest, on_tokens: Callable[[int], None]) -> RequestRecord:
        tokens: list[int] = []
        arrivals = Arrivals()
        calls = -1
        try:
            for token in self._stream(request):
                # Tokens that came without a call of the draft between them are of one forward.
                is_new = self._draft is None or self._draft.calls != calls or not arrivals.chunks
                calls = 0 if self._draft is None else self._draft.calls
                arrivals.add(1 if is_new else 1 + arrivals.chunks.pop()[1])
                tokens.append(int(token))
                on_tokens(1)
                if token in self._eos or len(tokens) >= self._params.max_tokens:
                    break
        except Exception as exc:  # noqa: BLE001 - whatever breaks in another project's code costs
            # this prompt, never the run.
            seconds = time.perf_counter() - arrivals.sent
            return failure(request, f"llama.cpp: {one_sentence(exc)}", seconds)
        return arrivals.record(request, token_ids=tokens, has_rounds=True)

    def _stream(self, request: BenchRequest) -> Iterator[int]:
        """Tokens one by one, without end."""
        params, model = self._params, self._model
        model.reset()  # what the last prompt left would shorten this one's prefill
        model.set_seed(request.seed % _SEEDS)
        stream: Iterator[int] = model.generate(
            list(request.token_ids),
            temp=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repeat_penalty=1.0,
        )
        return stream
