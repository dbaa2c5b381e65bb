"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark.request import TokenLogprob
from dspark.serve.spelling import Spelling

__all__ = ["Entry", "LogprobFeed", "chat_logprobs", "completion_logprobs"]

_LEAST = -9999.0
"""What stands for a probability of zero: JSON has no infinity, and OpenAI says this."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The log-probability of a token, and where it stands.

    Attributes:
        item: The log-probability.
        start: Bytes of the tokens before it.
        offset: Characters of them.
    """

    item: TokenLogprob
    start: int
    offset: int


@dataclass(slots=True)
class LogprobFeed:
    """Log-probabilities of a choice, given out together with the text of their tokens.

    Tokens without text (special ones) are left out, and so are tokens behind a stop string.

    Args:
        spelling: Spells tokens.
        visible: Special tokens that are part of the text all the same.
    """

    spelling: Spelling
    visible: frozenset[int] = frozenset()
    _waiting: list[Entry] = field(default_factory=list)
    _size: int = 0
    _characters: int = 0

    def push(self, items: Sequence[TokenLogprob]) -> None:
        """Add those of new tokens."""
        for item in items:
            token = item.token_id
            if self.spelling.is_special(token) and token not in self.visible:
                continue
            self._waiting.append(Entry(item, self._size, self._characters))
            spelt = self.spelling.of(token)
            self._size += len(spelt)
            self._characters += sum(byte & 0xC0 != 0x80 for byte in spelt)  # first bytes only

    def take(self, shown: int, *, is_final: bool) -> list[Entry]:
        """Those whose tokens begin in the text that was shown.

        Args:
            shown: UTF-8 bytes of the text so far.
            is_final: No more text will come. An answer that ended without a stop string shows
                all of its tokens.
        """
        if is_final and shown >= self._size:
            out, self._waiting = self._waiting, []
            return out
        out = [entry for entry in self._waiting if entry.start < shown]
        self._waiting = [] if is_final else self._waiting[len(out) :]
        return out


def chat_logprobs(
    entries: Sequence[Entry], spelling: Spelling, top: int
) -> dict[str, list[dict[str, Any]]]:
    """`logprobs` of a chat choice or delta."""
    return {
        "content": [
            {
                **_token(entry.item.token_id, entry.item.logprob, spelling),
                "top_logprobs": [
                    _token(token, value, spelling) for token, value in entry.item.top[:top]
                ],
            }
            for entry in entries
        ],
        "refusal": [],
    }


def _token(token: int, value: float, spelling: Spelling) -> dict[str, Any]:
    return {
        "token": spelling.text(token),
        "logprob": max(value, _LEAST),
        "bytes": list(spelling.of(token)),
    }


def completion_logprobs(
    entries: Sequence[Entry], spelling: Spelling, top: int
) -> dict[str, list[Any]]:
    """`logprobs` of a completion's choice or delta: OpenAI's older form, offsets in characters."""
    offsets: list[int] = []
    tops: list[dict[str, float] | None] = []
    for entry in entries:
        offsets.append(entry.offset)
        own = {entry.item.token_id: entry.item.logprob} if top else {}
        chosen = dict(entry.item.top[:top]) | own
        tops.append(
            {spelling.text(token): max(value, _LEAST) for token, value in chosen.items()}
            if top
            else None
        )
    return {
        "tokens": [spelling.text(entry.item.token_id) for entry in entries],
        "token_logprobs": [max(entry.item.logprob, _LEAST) for entry in entries],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
