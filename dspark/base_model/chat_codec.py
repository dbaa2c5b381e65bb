"""Text in and out of a DeepSeek-V4 model: its tokenizer, and its own chat encoding."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dspark.base_model.chat import (
    ASSISTANT,
    BOS,
    EOS,
    SETTING_ROLES,
    THINK_BEGIN,
    THINK_END,
    USER,
    ChatSettings,
    ReasoningMode,
    encode_messages,
)
from dspark.base_model.chat_parse import Completion, parse_completion
from dspark.base_model.chat_prose import ChatProse, Effort, read_prose
from dspark.errors import CheckpointError, ConfigError, DataError
from dspark.request import Message
from dspark.text import TextCodec, load_codec

__all__ = ["V4Codec", "load_v4_codec", "with_tools"]

_MAX_EFFORT_POSITIONS = 384 * 1024
"""Context in tokens that effort max was made for."""

_LAYOUT = (BOS, EOS, USER, ASSISTANT, THINK_BEGIN, THINK_END)

_log = logging.getLogger(__name__)


class V4Codec(TextCodec):
    """Encode prompts and decode tokens of a DeepSeek-V4 model.

    Args:
        tokenizer: A transformers tokenizer.
        settings: How chat messages are encoded; by default, without thinking.
        prose: The checkpoint's own texts; without them, tools and efforts cannot be encoded.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: ChatSettings | None = None,
        prose: ChatProse | None = None,
    ) -> None:
        super().__init__(tokenizer)
        self._settings = settings or ChatSettings()
        self._prose = prose or ChatProse()

    @property
    def settings(self) -> ChatSettings:
        """How chat messages are encoded."""
        return self._settings

    @property
    def prose(self) -> ChatProse:
        """The checkpoint's own texts."""
        return self._prose

    @property
    def has_chat_template(self) -> bool:
        """True: the encoding takes the place of a template."""
        return True

    def with_settings(self, settings: ChatSettings) -> V4Codec:
        """The same codec with other settings."""
        return V4Codec(self._tokenizer, settings, self._prose)

    def with_reasoning(self, think: bool | None, effort: str | None) -> V4Codec:
        """A codec that asks for thinking, or not; see `TextCodec.with_reasoning`.

        Raises:
            ConfigError: If there is no such effort, or one is given without thinking.
        """
        if think is False and effort is not None:
            raise ConfigError(f"effort {effort} was given, but thinking is off.")
        try:
            wanted = None if effort is None else Effort(effort)
        except ValueError as exc:
            names = ", ".join(known.value for known in Effort)
            raise ConfigError(f"effort is {effort!r}, but must be one of {names}.") from exc
        is_thinking = bool(think) or effort is not None
        mode = ReasoningMode.THINKING if is_thinking else ReasoningMode.CHAT
        return self.with_settings(replace(self._settings, mode=mode, effort=wanted))

    def chat_text(self, messages: Sequence[Message]) -> str:
        """Encode chat messages as text, ready for the assistant's answer.

        Raises:
            CapabilityError: If the checkpoint lacks a text that messages or settings need.
            DataError: If a message is malformed, or the last one leaves nothing to answer.
        """
        text = encode_messages(messages, self._settings, self._prose)
        _check_is_open(messages)
        return text

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> list[int]:
        """Encode chat messages, ready for the assistant's answer.

        Args:
            messages: The messages.
            tools: Functions the model may call, in OpenAI's form; see `with_tools`.

        Raises:
            CapabilityError: If the checkpoint lacks a text that messages or settings need.
            CheckpointError: If the tokenizer lacks a token of the chat layout.
            DataError: If a message is malformed, or the last one leaves nothing to answer.
        """
        text = self.chat_text(with_tools(messages, tools=tools) if tools else messages)
        for token in _LAYOUT:
            # Cut into pieces, a missing token would give a prompt the model has never seen.
            if len(self._ids(token)) != 1:
                raise CheckpointError(
                    f"the tokenizer has no token {token}, which the chat encoding needs."
                )
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        """Tokens of a text that holds its own special tokens."""
        ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
        return [int(i) for i in ids]

    def parse(self, text: str) -> Completion:
        """Parse a completion, special tokens included, in the mode of the settings.

        Raises:
            DataError: If the text is malformed.
        """
        return parse_completion(text, mode=self._settings.mode)

    def assistant_message(self, text: str, token_ids: Sequence[int]) -> dict[str, Any]:
        """The message of an answer, its reasoning and tool calls taken apart.

        An answer that was cut off, or does not keep to the layout, is split where its thinking
        ends; if it never ends, all of it is reasoning.
        """
        raw: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        try:
            return self.parse(raw if EOS in raw else raw + EOS).to_dict()
        except DataError:
            pass
        if self._settings.mode is not ReasoningMode.THINKING:
            return super().assistant_message(text, token_ids)
        reasoning, _, content = raw.partition(THINK_END)
        content = content.replace(EOS, "")
        return {"role": "assistant", "content": content, "reasoning_content": reasoning}

    def check_context(self, max_positions: int) -> None:
        """Warn if effort max has less room than it was made for.

        Args:
            max_positions: The context in tokens that the engine offers.
        """
        is_max = self._settings.effort is Effort.MAX
        if not is_max or self._settings.mode is not ReasoningMode.THINKING:
            return
        if max_positions < _MAX_EFFORT_POSITIONS:
            _log.warning(
                "effort max wants a context of at least %d tokens, but there are %d: "
                "the model may not come to its answer",
                _MAX_EFFORT_POSITIONS,
                max_positions,
            )


def _check_is_open(messages: Sequence[Message]) -> None:
    """Refuse messages after which it is not the assistant's turn."""
    last = messages[-1]
    role = last.get("role")
    if last.get("task") is not None or role in ("user", "developer", "tool"):
        return
    if role == "assistant" and last.get("wo_eos"):
        return
    raise DataError(
        f"message {len(messages) - 1}, the last, is of role {role}, so there is nothing to answer.",
        hint="end with a user or tool message, or an assistant message with wo_eos to go on with",
    )


def with_tools(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, object]] | None = None,
    response_format: Mapping[str, object] | None = None,
) -> list[dict[str, object]]:
    """Put a request's tools and response format where the encoding wants them.

    That is message 0, if it is a system or developer message; else an empty system message is put
    before it.
    """
    out = [dict(message) for message in messages]
    extra = {"tools": tools, "response_format": response_format}
    if not any(extra.values()):
        return out
    if not out or out[0].get("role") not in SETTING_ROLES:
        out.insert(0, {"role": "system", "content": ""})
    out[0].update({key: value for key, value in extra.items() if value})
    return out


def load_v4_codec(folder: Path, settings: ChatSettings | None = None) -> V4Codec | None:
    """Load the tokenizer and the chat prose of a DeepSeek-V4 model folder.

    Args:
        folder: A folder in Hugging Face layout, with the checkpoint's `encoding` folder.
        settings: How chat messages are encoded.

    Returns:
        The codec, or None if the folder has no tokenizer.

    Raises:
        CheckpointError: If the tokenizer or the encoder file cannot be read.
    """
    codec = load_codec(folder, tokenizer_class="PreTrainedTokenizerFast")
    if codec is None:
        return None
    return V4Codec(codec.tokenizer, settings, read_prose(folder))
