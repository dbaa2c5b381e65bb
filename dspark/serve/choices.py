"""The choices of an answer as they grow: text, parts of it, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dspark.output import TextPiece
from dspark.request import FinishReason, GenerationResult
from dspark.serve.jobs import Delta
from dspark.serve.logprobs import Entry, LogprobFeed
from dspark.serve.replies import Kind, Part, Reply

__all__ = ["Choice", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """What a choice gained.

    Attributes:
        parts: Parts of the answer.
        entries: Log-probabilities of the tokens whose text was shown.
        is_last: The choice is whole.
    """

    parts: tuple[Part, ...]
    entries: tuple[Entry, ...]
    is_last: bool


@dataclass(slots=True)
class Choice:
    """One choice.

    Attributes:
        index: Its place in the answer.
        reply: Takes its text apart; None where text is all there is.
        feed: Gives out its log-probabilities; None if they were not asked for.
        output_tokens: Tokens so far.
        result: What the engine made, once it is whole.
    """

    index: int
    reply: Reply | None = None
    feed: LogprobFeed | None = None
    output_tokens: int = 0
    result: GenerationResult | None = None
    _pieces: list[TextPiece] = field(default_factory=list)
    _shown: int = 0  # bytes of text
    _length: int = 0  # characters of text
    _first: int = 0  # characters before the pieces that are kept

    def advance(self, deltas: Sequence[Delta]) -> Step:
        """Take in what came for this choice, in order."""
        pieces = [piece for delta in deltas for piece in delta.pieces]
        text = "".join(piece.text for piece in pieces)
        self.result = next((d.result for d in deltas if d.result is not None), None)
        is_last = self.result is not None
        self.output_tokens += sum(len(delta.token_ids) for delta in deltas)
        self._pieces += pieces
        if self.reply is not None:
            parts = self.reply.push(text, is_final=is_last)
        else:
            parts = [Part(Kind.CONTENT, text, self._length)] if text else []
        self._length += len(text)
        return Step(tuple(parts), self._entries(deltas, text, is_last=is_last), is_last)

    def _entries(self, deltas: Sequence[Delta], text: str, *, is_last: bool) -> tuple[Entry, ...]:
        if self.feed is None:
            return ()
        self._shown += len(text.encode("utf-8", "replace"))
        for delta in deltas:
            self.feed.push(delta.logprobs)
        return tuple(self.feed.take(self._shown, is_final=is_last))

    def pieces_of(self, part: Part) -> list[tuple[str, bool]]:
        """The text of a part with what of it was drafted; parts must be asked for in order."""
        out: list[tuple[str, bool]] = []
        stop = part.start + len(part.text)
        at = self._first
        for piece in self._pieces:
            begin, end = max(at, part.start), min(at + len(piece.text), stop)
            if begin < end:
                out.append((piece.text[begin - at : end - at], piece.is_drafted))
            at += len(piece.text)
        while self._pieces and self._first + len(self._pieces[0].text) <= stop:
            self._first += len(self._pieces.pop(0).text)
        return out

    @property
    def finish_reason(self) -> str:
        """Why it ended, in OpenAI's words."""
        reason = None if self.result is None else self.result.finish_reason
        if reason is not FinishReason.STOP:
            return "length"
        return "stop"
