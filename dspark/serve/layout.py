"""How a model family lays out its answers: which tags mark reasoning and calls, and who keeps them.

Tags that a tokenizer counts as special tokens would be lost in decoding, so answers that need them
are decoded by a codec that keeps them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

from dspark.base_model.chat import CALLS_BEGIN, DSML, EOS
from dspark.base_model.chat_codec import V4Codec
from dspark.base_model.chat_parse import parse_completion
from dspark.errors import DataError
from dspark.serve.replies import (
    THINK_BEGIN,
    THINK_END,
    BareCalls,
    Kind,
    Part,
    Stage,
    TaggedCalls,
    ThinkStage,
    read_json_calls,
)
from dspark.text import TextCodec

__all__ = ["CallForm", "Layout"]

_PYTHON_TAG = "<|python_tag|>"
_TOOLS_VARIABLE = re.compile(r"\btools\b")
_TAIL = 16  # tokens at the end of a prompt in which its template may open the reasoning


class CallForm(Enum):
    """How a model writes calls of tools."""

    TAGGED = "tagged"  # <tool_call>{"name": ..., "arguments": ...}</tool_call>: Hermes, Qwen
    BARE = "bare"  # {"name": ..., "parameters": ...}: Llama 3
    DSML = "dsml"  # DeepSeek-V4's own


class _KeepingCodec(TextCodec):
    """Decodes like another codec, but keeps some special tokens."""

    def __init__(self, tokenizer: Any, hidden: frozenset[int]) -> None:
        super().__init__(tokenizer)
        self._hidden = hidden

    def decode(self, token_ids: Iterable[int]) -> str:
        """Decode tokens; special tokens are left out, except those that are kept."""
        shown = [token for token in token_ids if token not in self._hidden]
        text: str = self._tokenizer.decode(
            shown, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


class Layout:
    """The layout of a model's chat answers.

    Args:
        codec: The target's codec.

    Attributes:
        form: How it writes calls.
        knows_tools: Its template takes the tools itself.
        has_thinking: Its answers may begin with reasoning.
        has_switch: It can be asked to leave that out.
        codec: Decodes answers that may hold tags; None where the engine's codec keeps them.
        visible: Special tokens that this codec keeps.
    """

    def __init__(self, codec: TextCodec) -> None:
        tokenizer: Any = codec.tokenizer
        template = str(getattr(tokenizer, "chat_template", None) or "")
        vocabulary = codec.vocabulary()
        self.form = _form(codec, template)
        is_v4 = self.form is CallForm.DSML
        self.knows_tools = is_v4 or bool(_TOOLS_VARIABLE.search(template))
        self.has_thinking = is_v4 or THINK_END in template or THINK_END in vocabulary
        self.has_switch = is_v4 or "enable_thinking" in template
        added = tokenizer.added_tokens_decoder
        special = {int(i) for i, token in added.items() if token.special}
        special |= {int(i) for i in tokenizer.all_special_ids}
        tags = (THINK_BEGIN, THINK_END, DSML, "<tool_call>", "</tool_call>", _PYTHON_TAG)
        kept = {vocabulary[tag] for tag in tags if tag in vocabulary} & special
        self.visible = frozenset(kept)
        own = copy.deepcopy(tokenizer) if kept else None
        self.codec = None if own is None else _KeepingCodec(own, frozenset(special - kept))
        self._raw = _KeepingCodec(copy.deepcopy(tokenizer), frozenset())

    def opens_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends inside reasoning that its template has opened."""
        tail = self._raw.decode(prompt[-_TAIL:]).rstrip()
        return self.has_thinking and tail.endswith(THINK_BEGIN)

    def think_stage(self, prompt: Sequence[int]) -> ThinkStage | None:
        """What splits off the reasoning of an answer to a prompt, None if there is none."""
        if not self.has_thinking:
            return None
        return ThinkStage(starts_inside=self.opens_reasoning(prompt))

    def call_stage(self, known: frozenset[str]) -> Stage:
        """What finds calls in an answer.

        Args:
            known: Functions that may be called.
        """
        if self.form is CallForm.DSML:
            return TaggedCalls("\n\n" + CALLS_BEGIN.removesuffix(">"), None, _read_dsml)
        if self.form is CallForm.BARE:
            return BareCalls(_PYTHON_TAG, lambda text: read_json_calls(text, known=known))
        return TaggedCalls("<tool_call>", "</tool_call>", read_json_calls)


def _form(codec: TextCodec, template: str) -> CallForm:
    if isinstance(codec, V4Codec):
        return CallForm.DSML
    if "<tool_call>" not in template and '"parameters"' in template:
        return CallForm.BARE
    return CallForm.TAGGED


def _read_dsml(text: str) -> list[Part] | None:
    """Read a block of DeepSeek-V4's calls, without what opens it."""
    block = "\n\n" + CALLS_BEGIN.removesuffix(">") + text
    try:
        found = parse_completion(block if EOS in block else block + EOS, mode="chat")
    except DataError:
        return None
    return [Part(Kind.CALL, call.arguments, name=call.name) for call in found.tool_calls] or None
