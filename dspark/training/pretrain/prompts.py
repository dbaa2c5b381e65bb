"""Prompts of held-out text, in the form that `dspark eval` and `dspark bench` read.

Of a source file or a page: lines from its middle, to be continued with `--raw`. Of a chat: what the
user asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dspark.base_model.chat import ASSISTANT, USER
from dspark.training.pretrain.text import Document

__all__ = ["held_out_prompts"]


def held_out_prompts(
    documents: Iterable[Document], kinds: Sequence[str], *, characters: int = 400
) -> Iterator[dict[str, Any]]:
    """One prompt of every held-out document of some kinds.

    Args:
        documents: Of a collection.
        kinds: Which of them, see `text.KINDS`; they become the categories.
        characters: Of a source file or a page about so many are taken, whole lines.
    """
    for document in documents:
        if document.split != "held-out" or document.kind not in kinds:
            continue
        is_chat = document.kind == "chat"
        text = _question(document.text) if is_chat else _middle(document.text, characters)
        if text.strip():
            yield {"question_id": document.name, "category": document.kind, "prompt": text}


def _question(chat: str) -> str:
    return chat.partition(USER)[2].partition(ASSISTANT)[0]


def _middle(text: str, characters: int) -> str:
    """Lines of the second half of a text, from its first line on that is not empty."""
    start = text.find("\n", len(text) // 2) + 1
    lines = text[start:].lstrip("\n").splitlines(keepends=True)
    size = 0
    kept: list[str] = []
    for line in lines:
        if size + len(line) > characters and kept:
            break
        kept.append(line)
        size += len(line)
    return "".join(kept).rstrip("\n") + "\n"
