"""From committed tokens to text: incremental decoding, stop strings, what may be shown already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark.text import Detokenizer, TextCodec

__all__ = ["OutputText", "TextPiece"]


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A piece of generated text.

    Attributes:
        text: The text.
        is_drafted: True if the token that completed it was an accepted draft token.
    """

    text: str
    is_drafted: bool


class OutputText:
    """The text of one sample as its tokens arrive.

    Args:
        codec: The text codec, or None for targets without a tokenizer (no text, no stop strings).
        stop: Strings that end the text.
    """

    def __init__(self, codec: TextCodec | None, stop: Sequence[str]) -> None:
        self._detokenizer = None if codec is None else Detokenizer(codec)
        self._stop = tuple(stop)
        self._hold = max((len(s) for s in stop), default=1) - 1
        self._waiting: list[TextPiece] = []
        self._full = ""
        self._stopped_at: int | None = None

    @property
    def text(self) -> str:
        """The text so far, cut before a stop string."""
        return self._full if self._stopped_at is None else self._full[: self._stopped_at]

    def push(self, token: int, *, is_drafted: bool) -> bool:
        """Add a token.

        Args:
            token: Its id.
            is_drafted: True for an accepted draft token.

        Returns:
            True if the text now holds a stop string.
        """
        if self._detokenizer is None:
            return False
        return self._add(self._detokenizer.push([token]), is_drafted)

    def finish(self) -> bool:
        """Give out what the decoder held back; True if that completes a stop string."""
        if self._detokenizer is None or self._stopped_at is not None:
            return False
        return self._add(self._detokenizer.finish(), False)

    def _add(self, piece: str, is_drafted: bool) -> bool:
        if not piece:
            return False
        start = max(0, len(self._full) - self._hold)
        self._full += piece
        self._waiting.append(TextPiece(piece, is_drafted))
        if not self._stop:
            return False
        found = [i for i in (self._full.find(s, start) for s in self._stop) if i >= 0]
        if found:
            self._stopped_at = min(found)
        return bool(found)

    def take(self, *, is_final: bool) -> list[TextPiece]:
        """Return the pieces that are certain and were not returned before.

        Args:
            is_final: True when no more tokens will come; otherwise as many characters are held
                back as could begin a stop string.
        """
        if not self._waiting:
            return []
        out: list[TextPiece] = []
        if not self._stop:  # nothing is held back or cut off
            out, self._waiting = self._waiting, out
            return out
        waiting = sum(len(piece.text) for piece in self._waiting)
        given = len(self._full) - waiting
        limit = len(self.text) - (0 if is_final else self._hold)
        while self._waiting and given < limit:
            piece = self._waiting.pop(0)
            room = limit - given
            if len(piece.text) > room:
                rest = TextPiece(piece.text[room:], piece.is_drafted)
                self._waiting.insert(0, rest)
                piece = TextPiece(piece.text[:room], piece.is_drafted)
            given += len(piece.text)
            out.append(piece)
        return out
