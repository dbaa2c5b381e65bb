"""The bytes of single tokens, which log-probabilities are reported with."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from dspark.text import TextCodec

__all__ = ["Spelling"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_character() -> dict[str, int]:
    """The bytes that byte-level tokenizers write as printable characters.

    **Source:** the byte table of GPT-2: printable bytes stand for themselves, the others for the
    characters from 256 on, in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(value): value for value in printable}
    others = [value for value in range(256) if value not in table.values()]
    return table | {chr(256 + i): value for i, value in enumerate(others)}


class Spelling:
    """Tokens as bytes.

    Args:
        codec: The target's codec; a copy of it is used.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = copy.deepcopy(codec)
        tokenizer: Any = self._codec.tokenizer
        self._added: dict[int, str] = {
            int(i): str(token.content) for i, token in tokenizer.added_tokens_decoder.items()
        }
        named = {int(i) for i in tokenizer.all_special_ids}
        added = {int(i) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._special = frozenset(named | added)
        self._names = {i: text for text, i in self._codec.vocabulary().items()}
        decoder = _decoder(tokenizer)
        self._table = _byte_of_character() if '"ByteLevel"' in decoder else None
        self._has_bytes = '"ByteFallback"' in decoder
        self._has_marks = "\u2581" in decoder
        self._known: dict[int, bytes] = {}

    def is_special(self, token: int) -> bool:
        """True for tokens that have no text in an answer."""
        return token in self._special

    def of(self, token: int) -> bytes:
        """The bytes of a token; special tokens are spelled by their names."""
        if token not in self._known:
            self._known[token] = self._spell(token)
        return self._known[token]

    def text(self, token: int) -> str:
        """The same as text; bytes that are no character become U+FFFD."""
        return self.of(token).decode("utf-8", "replace")

    def _spell(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        name = self._names.get(token)
        if name is None:
            return b""
        if self._table is not None and all(character in self._table for character in name):
            return bytes(self._table[character] for character in name)
        if self._has_bytes and (found := _BYTE.fullmatch(name)):
            return bytes([int(found[1], 16)])
        if self._has_marks:
            return name.replace("\u2581", " ").encode()
        return self._codec.decode([token]).encode("utf-8", "replace")


def _decoder(tokenizer: Any) -> str:
    """The decoder of a tokenizer as JSON text; "" if it has none that can be read."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    return json.dumps(json.loads(backend.to_str()).get("decoder"), ensure_ascii=False)
