"""The tokens of a tokenizer as llguidance sees them: their bytes, built once per tokenizer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspark.errors import CapabilityError, ConfigError

if TYPE_CHECKING:
    from dspark.text import TextCodec

__all__ = ["TokenTable", "require_llguidance", "table_of"]


@dataclass(frozen=True, slots=True)
class TokenTable:
    """A tokenizer's tokens.

    Attributes:
        tokenizer: llguidance's form of them.
        vocab_size: How many there are.
        end_tokens: Those that end a text.
        ids: Token as the tokenizer spells it -> id.
    """

    tokenizer: Any
    vocab_size: int
    end_tokens: frozenset[int]
    ids: Mapping[str, int]


_tables: weakref.WeakKeyDictionary[Any, TokenTable] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def require_llguidance() -> Any:
    """The library.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import llguidance
    except ImportError as exc:
        raise ConfigError(
            "grammars need the llguidance package, which is not installed.",
            hint="pip install 'dspark[grammar]'",
        ) from exc
    return llguidance


def table_of(codec: TextCodec | None) -> TokenTable:
    """The tokens of a codec's tokenizer; made on first use (a second for large ones), then kept.

    Args:
        codec: A text codec, or None.

    Returns:
        The table.

    Raises:
        CapabilityError: If there is no tokenizer, its tokens have no known bytes, or none of them
            ends a text.
    """
    if codec is None or getattr(codec, "tokenizer", None) is None:
        raise CapabilityError(
            "this model has no tokenizer, so no grammar can be followed.",
            hint="put its tokenizer.json into the folder",
        )
    with _lock:
        table = _tables.get(codec.tokenizer)
        if table is None:
            table = _tables[codec.tokenizer] = _build(codec)
    return table


def _build(codec: TextCodec) -> TokenTable:
    require_llguidance()
    end_tokens = codec.eos_token_ids
    from llguidance.hf import from_tokenizer

    if not end_tokens:
        raise CapabilityError(
            "this model's tokenizer names no end token, so no grammar could come to its end."
        )
    try:
        made = from_tokenizer(codec.tokenizer, eos_token=list(end_tokens))
    except ValueError as exc:
        raise CapabilityError(
            f"no grammar can be followed with this tokenizer: {str(exc).splitlines()[0]}",
            hint="grammars need a tokenizer that has a tokenizer.json",
        ) from exc
    return TokenTable(made, int(made.vocab_size), frozenset(end_tokens), codec.vocabulary())
