"""Text in and out: tokenizer, chat template, incremental decoding.

A thin layer over a Hugging Face tokenizer. Encoding raw text follows the tokenizer's own rule about
a leading BOS; chat messages go through the model's own template.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dspark.errors import CapabilityError, CheckpointError, DataError
from dspark.request import Message

__all__ = ["Detokenizer", "TextCodec", "load_codec", "vocabulary_fingerprint"]


class TextCodec:
    """Encode prompts and decode tokens.

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template_options: dict[str, Any] = {}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer itself."""
        return self._tokenizer

    @property
    def has_chat_template(self) -> bool:
        """True if chat messages can be encoded."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End tokens that the tokenizer itself names."""
        eos = self._tokenizer.eos_token_id
        return () if eos is None else (int(eos),)

    def encode(self, text: str) -> list[int]:
        """Encode raw text, with the special tokens that the tokenizer adds by itself.

        Raises:
            DataError: If the text is not valid Unicode.
        """
        _check_unicode(text)
        return list(self._tokenizer.encode(text))

    def encode_plain(self, text: str) -> list[int]:
        """Encode text without any special tokens around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> list[int]:
        """Encode chat messages with the model's template, ready for the assistant's answer.

        Args:
            messages: The messages.
            tools: Functions the model may call, in OpenAI's form; a template without a place for
                them passes them over.

        Raises:
            CapabilityError: If the model has no chat template.
            DataError: If a message is not valid Unicode, or the template refuses the messages.
        """
        if not self.has_chat_template:
            raise CapabilityError(
                "this model has no chat template, so it cannot take chat messages.",
                hint="give the prompt as raw text",
            )
        import jinja2

        for message in messages:
            if isinstance(content := message.get("content"), str):
                _check_unicode(content)
        try:
            ids = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **({"tools": [dict(tool) for tool in tools]} if tools else {}),
                **self._template_options,
            )
        except (jinja2.TemplateError, KeyError, TypeError, ValueError) as exc:
            raise DataError(f"the chat template refuses these messages: {exc}") from exc
        return [int(i) for i in ids]

    def assistant_message(self, text: str, token_ids: Sequence[int]) -> dict[str, Any]:
        """The chat message that an answer makes, for the next turn.

        Args:
            text: The answer as it was shown.
            token_ids: Its tokens, for models whose special tokens structure the answer.
        """
        return {"role": "assistant", "content": text}

    def with_reasoning(self, think: bool | None, effort: str | None) -> TextCodec:
        """A codec whose chat prompts ask the model to think, or not.

        Args:
            think: Think before the answer; None leaves it to the model.
            effort: How hard, for models that know it.

        Raises:
            CapabilityError: If the model's template has no such switch.
        """
        template = str(getattr(self._tokenizer, "chat_template", None) or "")
        if effort is not None or "enable_thinking" not in template:
            what = "--effort" if effort is not None else "--think or --no-think"
            raise CapabilityError(
                f"{what} was given, but the model's chat template has no such switch.",
                hint=f"leave out {what}",
            )
        codec = TextCodec(self._tokenizer)
        codec._template_options = {"enable_thinking": think}
        return codec

    def check_context(self, max_positions: int) -> None:
        """Warn where a setting wants a longer context than the model has; nothing does here."""

    def decode(self, token_ids: Iterable[int]) -> str:
        """Decode tokens; special tokens are left out."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def vocabulary(self) -> dict[str, int]:
        """Token text -> id, to compare two tokenizers."""
        vocab: dict[str, int] = self._tokenizer.get_vocab()
        return vocab


class Detokenizer:
    """Decode a growing sequence of tokens piece by piece.

    The pieces, put together, are `codec.decode` of all tokens: text is held back while the last
    token ends inside a character, and a window of earlier tokens gives the tokenizer the context
    that decides about spaces. (One exception: where a tokenizer with byte fallback meets an
    unfinished character, it decodes the whole run of bytes around it as U+FFFD; what was given out
    of that run stays.)

    Args:
        codec: The codec.
    """

    _WINDOW = 6

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._tokens: list[int] = []
        self._start = 0  # window of tokens that the next piece is decoded with
        self._done = 0  # tokens whose text was given out
        self._ends: deque[int] = deque()  # earlier values of _done: no character is cut there
        self._before = ""  # text of the window's tokens up to _done
        self.text = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; return the text that is now certain."""
        self._tokens.extend(tokens)
        after = self._codec.decode(self._tokens[self._start :])
        if after.endswith("\ufffd") or len(after) < len(self._before):
            return ""
        piece = after[len(self._before) :]
        self._ends.append(self._done)
        self._done = len(self._tokens)
        self._before = after
        if self._done - self._start > 2 * self._WINDOW:  # seldom: every move decodes once more
            self._move_window()
        self.text += piece
        return piece

    def _move_window(self) -> None:
        """Begin the window where no character is cut, with text in it that decides about spaces."""
        while self._ends and self._ends[0] <= self._done - self._WINDOW:
            start = self._ends.popleft()
            if self._ends and self._ends[0] <= self._done - self._WINDOW:
                continue  # a later one will do
            text = self._codec.decode(self._tokens[start : self._done])
            if text:
                self._start, self._before = start, text

    def finish(self) -> str:
        """Return what was held back; an unfinished character becomes U+FFFD."""
        after = self._codec.decode(self._tokens[self._start :])
        piece = after[len(self._before) :]
        self._before = after
        self._done = len(self._tokens)
        self.text += piece
        return piece


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise DataError("the prompt is not valid Unicode text.") from exc


def load_codec(folder: Path, *, tokenizer_class: str = "AutoTokenizer") -> TextCodec | None:
    """Load the tokenizer of a model folder.

    Args:
        folder: A folder in Hugging Face layout.
        tokenizer_class: The transformers class that reads it; any but AutoTokenizer reads the
            tokenizer's files alone and does not look at the model's config.

    Returns:
        The codec, or None if the folder has no tokenizer.

    Raises:
        CheckpointError: If there is a tokenizer, but it cannot be read.
    """
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        return None
    import transformers

    try:
        tokenizer = getattr(transformers, tokenizer_class).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        return TextCodec(tokenizer)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as exc:
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {exc}") from exc
    except Exception as exc:
        # The tokenizers library raises plain Exception for a malformed tokenizer.json.
        if type(exc) is not Exception:
            raise
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {exc}") from exc


def vocabulary_fingerprint(codec: TextCodec) -> str:
    """Checksum of the vocabulary: every token and its id."""
    items = sorted(codec.vocabulary().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()
