"""Where a turn begins and ends in a chat template, found by rendering turns of known content.

The tokens that all renderings begin with are what stands before the content, those they all end
with what follows it. This needs nothing of a template but that it renders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dspark.errors import CapabilityError, DataError
from dspark.request import Message
from dspark.text import TextCodec

__all__ = ["TurnMarks", "answer_end", "question_marks"]

# They share neither first nor last token, and no tokenizer joins them to a marker beside them.
_SENTINELS = ("Apple the first", "zebra crossing", "77 dogs", "Quiet 99")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnMarks:
    """What a template puts around a user's first turn.

    Attributes:
        prefix: Tokens before the content, system prompt included.
        end_token: The special token that ends the turn, or None if ordinary text does.
        end_text: What ends the turn, as text.
    """

    prefix: tuple[int, ...]
    end_token: int | None
    end_text: str


def question_marks(codec: TextCodec) -> TurnMarks:
    """Find what a template puts around a user's first turn.

    Args:
        codec: The target's text codec.

    Raises:
        CapabilityError: If there is no template, or it does not take a question as it stands.
    """
    if not codec.has_chat_template:
        raise CapabilityError(
            "this model has no chat template, so it cannot be asked to write questions.",
            hint="give prompts with --prompts, or use an instruct model",
        )
    prefix, suffix = _around(codec, lambda text: [{"role": "user", "content": text}])
    if not prefix:
        raise CapabilityError(
            "the chat template puts nothing before the user's text, so the model cannot be asked "
            "to write questions.",
            hint="give prompts with --prompts",
        )
    markers = _markers(codec)
    end = next((token for token in suffix if token in markers), None)
    shown = suffix if end is None else [end]
    text = codec.tokenizer.decode(
        shown, skip_special_tokens=False, clean_up_tokenization_spaces=False
    ).rstrip()
    if not text.strip():
        raise CapabilityError(
            "the chat template puts nothing after the user's text, so no question would end.",
            hint="give prompts with --prompts",
        )
    return TurnMarks(prefix=tuple(prefix), end_token=end, end_text=text)


def answer_end(codec: TextCodec) -> int | None:
    """The token that ends the assistant's turn, or None if there is none.

    Args:
        codec: The target's text codec.
    """
    end = None
    if codec.has_chat_template:
        try:
            _, suffix = _around(codec, _answered)
            markers = _markers(codec)
            end = next((token for token in suffix if token in markers), None)
        except CapabilityError:  # it does not show answers as they stand
            end = None
    return end if end is not None else next(iter(codec.eos_token_ids), None)


def _answered(text: str) -> list[Message]:
    return [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "Thanks."},
    ]


def _around(codec: TextCodec, build: Callable[[str], list[Message]]) -> tuple[list[int], list[int]]:
    """Tokens before and after a content, whatever it is."""
    rendered = []
    for text in _SENTINELS:
        try:
            ids = codec.encode_chat(build(text))
        except DataError as exc:
            raise CapabilityError(f"the chat template takes no plain text: {exc.message}") from exc
        if codec.decode(ids).count(text) != 1:
            raise CapabilityError(
                "the chat template changes, drops or repeats the user's text, so the place where "
                "it begins cannot be found.",
                hint="give prompts with --prompts",
            )
        rendered.append(ids)
    prefix = _shared(rendered)
    suffix = _shared([ids[len(prefix) :][::-1] for ids in rendered])
    return prefix, suffix[::-1]


def _shared(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all sequences begin with."""
    out = []
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        out.append(tokens[0])
    return out


def _markers(codec: TextCodec) -> set[int]:
    """Tokens that are no ordinary text; some tokenizers add runs of spaces, which are."""
    tokenizer = codec.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {
        *tokenizer.all_special_ids,
        *(number for number, token in added.items() if not str(token).isspace()),
    }
