"""From a job to a response: whole, or as a stream of server-sent events."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from dspark._version import __version__
from dspark.serve.choices import Choice, Step
from dspark.serve.failures import ApiError
from dspark.serve.fields import SharedFields, StreamFields
from dspark.serve.forms import AnswerForm
from dspark.serve.jobs import Delta, Job
from dspark.serve.usage import metrics_json, progress_usage, usage_json
from dspark.serve.wire import DONE, event

__all__ = ["Answer"]


class Answer:
    """The answer to a request.

    Args:
        job: Its work.
        form: How choices are written.
        choices: The choices, in order.
        model: The model's name in the API.
        fields: The request.
    """

    def __init__(
        self,
        job: Job,
        form: AnswerForm,
        choices: Sequence[Choice],
        *,
        model: str,
        fields: SharedFields,
    ) -> None:
        self.job = job
        self._form = form
        self._choices = choices
        self._options = fields.stream_options or StreamFields()
        self._head = {
            "id": form.prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"dspark-{__version__}",
        }

    async def collect(self) -> dict[str, Any]:
        """Wait for all of it.

        Raises:
            ApiError: If the engine failed.
            ClientGoneError: If the client has gone.
        """
        steps: list[list[Step]] = [[] for _ in self._choices]
        while deltas := await self.job.next():
            for index, own in _by_choice(deltas):
                steps[index].append(self._choices[index].advance(own))
        pairs = zip(self._choices, steps, strict=True)
        results = self.job.results.values()
        return {
            **self._head,
            "object": self._form.name,
            "choices": [self._form.whole(choice, own) for choice, own in pairs],
            "usage": usage_json(results),
            "metrics": metrics_json(results),
        }

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield events as the answer grows, the last one being [DONE].

        An error before the first event is raised; later ones are events.

        Raises:
            ApiError: If the engine failed before anything was sent.
            ClientGoneError: If the client has gone.
        """
        deltas = await self.job.next()
        for choice in self._choices:
            for value in self._form.begin(choice):
                yield event(self._chunk([value]))
        try:
            while deltas:
                for index, own in _by_choice(deltas):
                    choice = self._choices[index]
                    for value in self._form.chunks(choice, choice.advance(own)):
                        yield event(self._chunk([value]))
                deltas = await self.job.next()
        except ApiError as exc:
            yield event(exc.to_dict())
            yield DONE
            return
        if self._options.include_usage:
            yield event(self._last())
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        out = {**self._head, "object": self._form.chunk_name, "choices": choices}
        if self._options.continuous_usage_stats:
            prompt = sum(len(own) for own in self.job.prompts)
            out["usage"] = progress_usage(prompt, sum(c.output_tokens for c in self._choices))
        elif self._options.include_usage:
            out["usage"] = None
        return out

    def _last(self) -> dict[str, Any]:
        results = self.job.results.values()
        out = self._chunk([])
        out["usage"] = usage_json(results)
        out["metrics"] = metrics_json(results)
        return out


def _by_choice(deltas: Sequence[Delta]) -> list[tuple[int, list[Delta]]]:
    """Deltas of every choice that has some; what piled up for one is taken together."""
    found: dict[int, list[Delta]] = {}
    for delta in deltas:
        found.setdefault(delta.index, []).append(delta)
    return list(found.items())
