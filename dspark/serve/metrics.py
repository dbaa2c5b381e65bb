"""Prometheus metrics, under vLLM's names where vLLM has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from dspark.active import ActiveRequest, Phase
from dspark.request import FinishReason, RequestStats

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
_LABELS = ("model_name", "engine")


class _Seen:
    """What was counted of a request so far."""

    def __init__(self) -> None:
        self.prompt = 0
        self.output = 0
        self.drafts = 0
        self.nodes = 0
        self.accepted: list[int] = []
        self.preemptions = 0
        self.is_started = False
        self.is_done = False


class Metrics:
    """The metrics of a server.

    Args:
        model: The model's name in the API.
    """

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        ProcessCollector(registry=self._registry)
        count = self._counter
        self._drafts = count("vllm:spec_decode_num_drafts", "Rounds that had a draft.")
        self._nodes = count("vllm:spec_decode_num_draft_tokens", "Drafted tokens verified.")
        self._accepted = count("vllm:spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
        self._per_position = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Rounds that accepted a drafted token at this place, from 0.",
            (*_LABELS, "position"),
            registry=self._registry,
        )
        self._prompt = count("vllm:prompt_tokens", "Prompt tokens of choices that were begun.")
        self._output = count("vllm:generation_tokens", "Tokens generated.")
        self._preemptions = count("vllm:num_preemptions", "Times a request gave up its memory.")
        self._finished = Counter(
            "vllm:request_success",
            "Choices that ended, by reason.",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        self._first = self._histogram("vllm:time_to_first_token_seconds", "To the first token.")
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "To the end.")
        self._queue = self._histogram("vllm:request_queue_time_seconds", "In the queue.")
        self._each = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Per token after the first.", _PER_TOKEN
        )
        self._http = Counter(
            "dspark:http_requests",
            "HTTP requests by path and status.",
            ("path", "status"),
            registry=self._registry,
        )

    def _counter(self, name: str, text: str) -> Counter:
        metric = Counter(name, text, _LABELS, registry=self._registry)
        return metric.labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        text = f"Seconds of a choice: {text[0].lower()}{text[1:]}"
        metric = Histogram(name, text, _LABELS, registry=self._registry, buckets=buckets)
        return metric.labels(**self._labels)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a metric whose value is read when it is asked for."""
        metric = Gauge(name, text, _LABELS, registry=self._registry)
        metric.labels(**self._labels).set_function(read)

    def page(self) -> bytes:
        """The page in Prometheus's text format."""
        return generate_latest(self._registry)

    def note_http(self, path: str, status: int) -> None:
        """Count an HTTP request.

        Args:
            path: The route, which is one of a few.
            status: Of the response.
        """
        self._http.labels(path=path, status=str(status)).inc()

    # -- from the engine's thread -------------------------------------------------------------

    def watch(self, requests: Sequence[ActiveRequest], notes: dict[int, Any]) -> None:
        """Count what the requests of a job did since they were seen last.

        Args:
            requests: The requests.
            notes: What was counted of each; kept with the job.
        """
        for request in requests:
            seen = notes.setdefault(request.request_id, _Seen())
            if not seen.is_done:
                self._count(request, seen)

    def _count(self, request: ActiveRequest, seen: _Seen) -> None:
        stats = request.stats
        output = request.num_generated
        if output and not seen.is_started:
            seen.is_started = True
            self._prompt.inc(stats.prompt_tokens)
            self._first.observe(stats.time_to_first_token)
        self._output.inc(output - seen.output)
        self._preemptions.inc(stats.preemptions - seen.preemptions)
        seen.output, seen.preemptions = output, stats.preemptions
        self._count_drafts(stats, seen)
        if request.phase is Phase.DONE:
            seen.is_done = True
            self._end(request)

    def _count_drafts(self, stats: RequestStats, seen: _Seen) -> None:
        drafts = stats.verified_at_depth[0] if stats.verified_at_depth else 0
        self._drafts.inc(drafts - seen.drafts)
        self._nodes.inc(stats.verified - seen.nodes)
        seen.drafts, seen.nodes = drafts, stats.verified
        seen.accepted += [0] * (len(stats.accepted_at_depth) - len(seen.accepted))
        for depth, value in enumerate(stats.accepted_at_depth):
            more = value - seen.accepted[depth]
            if more:
                self._per_position.labels(**self._labels, position=str(depth)).inc(more)
                self._accepted.inc(more)
            seen.accepted[depth] = value

    def _end(self, request: ActiveRequest) -> None:
        stats, reason = request.stats, request.finish_reason or FinishReason.CANCELLED
        names = {FinishReason.CANCELLED: "abort"}
        name = names.get(reason, reason.value)
        self._finished.labels(**self._labels, finished_reason=name).inc()
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._whole.observe(stats.seconds_total)
            self._queue.observe(stats.seconds_waiting)
            rest = request.num_generated - 1
            if rest > 0:
                self._each.observe((stats.seconds_total - stats.time_to_first_token) / rest)
