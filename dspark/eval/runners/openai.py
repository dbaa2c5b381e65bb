"""Any server that speaks the OpenAI API, as a runner: vLLM, SGLang, llama.cpp's, our own.

Answers are streamed. An answer's tokens are counted by the server's `usage`, its chunks by the
`usage` that they carry (vLLM and SGLang send it when asked), else by the target's tokenizer, scaled
so that they add up to the answer. What the server's /metrics page counts of speculation is read
before and after a run.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark.errors import DataError
from dspark.eval.bench_records import RequestRecord, RunOutput
from dspark.eval.runners.base import Arrivals, BenchRequest, Progress, one_sentence
from dspark.eval.runners.counters import ServerCounters, apply_counters, parse_metrics
from dspark.eval.runners.endpoint import Endpoint, ServerError
from dspark.request import SamplingParams
from dspark.text import TextCodec

__all__ = ["OpenAIRunner", "first_model"]

_MOST_SILENT = 3
"""Requests in a row without an answer after which a run asks no more."""

_EXTENDED = ("vllm:", "sglang:")
"""Metrics by which servers are known that take more parameters than OpenAI's API has."""

_SEEDS = 1 << 31
_TICK = 0.2  # seconds between two reports of progress


@dataclass(slots=True)
class _Answer:
    """What has come of one answer.

    Attributes:
        sent: When the prompt was sent.
        ended: When the answer ended or failed.
        error: One sentence if it failed.
        pieces: (when, text, tokens so far or None) of every event with text.
        total: Tokens of the answer by the server's count.
        prompt: Tokens of the prompt by the server's count.
        is_whole: The server said that the answer ends here.
    """

    sent: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    error: str | None = None
    pieces: list[tuple[float, str, int | None]] = field(default_factory=list)
    total: int | None = None
    prompt: int | None = None
    is_whole: bool = False

    def take(self, when: float, event: Any) -> None:
        """Take in an event."""
        usage = event.get("usage") or {}
        so_far = usage.get("completion_tokens")
        if so_far is not None:
            self.total, self.prompt = int(so_far), usage.get("prompt_tokens", self.prompt)
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or choice
            text = "".join(
                delta.get(key) or ""
                for key in ("reasoning_content", "reasoning", "content", "text")
            )
            if text:
                self.pieces.append((when, text, None if so_far is None else int(so_far)))
            self.is_whole = self.is_whole or choice.get("finish_reason") is not None

    def counts(self, codec: TextCodec | None) -> list[int]:
        """Tokens of every piece; 0 for one that only ends a token begun before."""
        exact = [so_far for _, _, so_far in self.pieces if so_far is not None]
        if exact and len(exact) == len(self.pieces):
            exact[-1] = self.total or exact[-1]  # tokens without text may come at the end
            return [now - before for before, now in zip([0, *exact], exact, strict=False)]
        if self.total == len(self.pieces) or codec is None:
            weights = [1] * len(self.pieces)
        else:
            weights = [max(1, len(codec.encode_plain(text))) for _, text, _ in self.pieces]
        total = sum(weights) if self.total is None else self.total
        return _share_out(total, weights)

    def record(self, request: BenchRequest, codec: TextCodec | None) -> RequestRecord:
        """Its record."""
        arrivals = Arrivals(sent=self.sent)
        for (when, _, _), tokens in zip(self.pieces, self.counts(codec), strict=True):
            arrivals.add(tokens, when)
        return arrivals.record(
            request, prompt_tokens=self.prompt, error=self.error, ended=self.ended
        )


def _share_out(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to the weights that add up to the total."""
    whole, done, shares, given = sum(weights), 0, [], 0
    for weight in weights:
        done += weight
        share = round(total * done / whole) - given
        shares.append(share)
        given += share
    return shares


@dataclass(slots=True)
class _Run:
    """One run under way, shared by the threads that ask.

    Attributes:
        waiting: (index, prompt) not asked yet.
        finished: (index, answer).
        pieces: Pieces that came of every prompt, for the progress.
        is_over: Set to ask no more.
        silent: Requests without an answer since the last one with an answer.
    """

    waiting: queue.SimpleQueue[tuple[int, BenchRequest]]
    pieces: list[int]
    finished: queue.SimpleQueue[tuple[int, _Answer]] = field(default_factory=queue.SimpleQueue)
    is_over: threading.Event = field(default_factory=threading.Event)
    silent: int = 0


class OpenAIRunner:
    """A server.

    Args:
        endpoint: Where it is.
        params: Sampling parameters.
        model: The model to ask for, as the server calls it.
        codec: The target's codec, to count tokens the server does not count.
        is_raw: Ask for a completion of the text; otherwise for an answer to a chat message.
        think: Passed to the server's chat template if not None.
    """

    library: Mapping[str, str] | None = None
    is_local = False

    def __init__(
        self,
        endpoint: Endpoint,
        params: SamplingParams,
        *,
        model: str,
        codec: TextCodec | None = None,
        is_raw: bool = False,
        think: bool | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._params = params
        self._model = model
        self._codec = codec
        self._is_raw = is_raw
        self._think = think
        self._is_extended = False
        self.notes: Sequence[str] = (f"the server's model {model}, tokenizer and chat template",)

    def refuses(self, concurrency: int) -> str | None:
        """Nothing: the server decides how it batches."""
        return None

    def prepare(self) -> None:
        """Find out by its metrics which parameters the server takes."""
        self._is_extended = any(name.startswith(_EXTENDED) for name in self._counters().names)

    def close(self) -> None:
        """Nothing to let go of."""

    def run(
        self, requests: Sequence[BenchRequest], concurrency: int, on_progress: Progress
    ) -> RunOutput:
        """Ask all prompts; one that ends makes room for the next one at once."""
        before = self._counters()
        run = _Run(waiting=queue.SimpleQueue(), pieces=[0] * len(requests))
        for pair in enumerate(requests):
            run.waiting.put(pair)
        start = time.perf_counter()
        for _ in range(min(concurrency, len(requests))):
            threading.Thread(target=self._work, args=(run,), daemon=True).start()
        answers = self._collect(run, len(requests), on_progress)
        seconds = time.perf_counter() - start
        pairs = zip(requests, answers, strict=True)
        records = tuple(answer.record(request, self._codec) for request, answer in pairs)
        output = RunOutput(seconds=seconds, requests=records)
        counted = self._counters().since(before)
        return apply_counters(output, counted) if counted else output

    def _collect(self, run: _Run, count: int, on_progress: Progress) -> list[_Answer]:
        answers: dict[int, _Answer] = {}
        try:
            while len(answers) < count:
                try:
                    index, answer = run.finished.get(timeout=_TICK)
                    answers[index] = answer
                    run.pieces[index] = self._params.max_tokens
                except queue.Empty:
                    pass
                shares = [min(1.0, n / self._params.max_tokens) for n in run.pieces]
                on_progress(sum(shares) / count)
        finally:
            run.is_over.set()  # after Ctrl-C the threads finish what they wait for and stop
        return [answers[index] for index in range(count)]

    def _work(self, run: _Run) -> None:
        """Ask one prompt after the other until there are none."""
        while not run.is_over.is_set():
            try:
                index, request = run.waiting.get_nowait()
            except queue.Empty:
                return
            answer = _Answer()
            if run.silent < _MOST_SILENT:
                is_silent = self._ask(request, answer, run.pieces, index)
                run.silent = run.silent + 1 if is_silent else 0
            else:
                answer.error = f"not asked, since {_MOST_SILENT} requests before it got no answer."
            answer.ended = time.perf_counter()
            run.finished.put((index, answer))

    def _ask(self, request: BenchRequest, answer: _Answer, pieces: list[int], index: int) -> bool:
        """Ask one prompt; returns whether there was no answer at all."""
        path = "/completions" if self._is_raw else "/chat/completions"
        try:
            for when, event in self._endpoint.stream(path, self._body(request)):
                answer.take(when, event)
                pieces[index] += 1
        except ServerError as exc:
            answer.error = str(exc)
            return exc.is_silent
        except Exception as exc:  # noqa: BLE001 - events can be malformed in any way, and a thread
            # that dies would leave the run waiting for ever.
            answer.error = f"an event could not be read ({type(exc).__name__}: {one_sentence(exc)})"
            return False
        if not answer.is_whole:
            answer.error = f"the stream ended in the answer, after {len(answer.pieces)} events."
        elif not answer.pieces:
            answer.error = "the answer has no text."
        return False

    def _body(self, request: BenchRequest) -> dict[str, Any]:
        params = self._params
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": request.seed % _SEEDS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._is_raw:
            body["prompt"] = request.text
        else:
            body["messages"] = [{"role": "user", "content": request.text}]
        if params.ignore_eos:
            body["ignore_eos"] = True
        if params.min_p:
            body["min_p"] = params.min_p
        if params.top_k:
            body["top_k"] = params.top_k
        if self._is_extended:
            body["stream_options"]["continuous_usage_stats"] = True
            body["top_k"] = params.top_k or -1  # left out, the model's own default would hold
        if self._think is not None and not self._is_raw:
            body["chat_template_kwargs"] = {"enable_thinking": self._think}
        return body

    def _counters(self) -> ServerCounters:
        try:
            return parse_metrics(self._endpoint.get_text("/metrics"))
        except ServerError:
            return ServerCounters()  # not every server has them


def first_model(endpoint: Endpoint) -> str:
    """The first model that a server lists.

    Raises:
        DataError: If it does not answer, or lists none.
    """
    try:
        listed = endpoint.get_json("/models")
        return str(listed["data"][0]["id"])
    except ServerError as exc:
        raise DataError(
            f"the server at {endpoint.url} does not tell its models: {exc}",
            hint="check the URL, or name the model: --url-model",
        ) from exc
    except (KeyError, IndexError, TypeError) as exc:
        raise DataError(
            f"the server at {endpoint.url} lists no model.", hint="name it: --url-model"
        ) from exc
