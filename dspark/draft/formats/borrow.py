"""The target's embedding and head, copied into a draft or taken out of it.

Some layouts hold copies of what a draft shares with its target (DeepSpec, speculators, reduced
vocabularies everywhere), others have no place for them and use the target's (SpecForge, SGLang).
Taking out is done only where the draft's own are the target's, row for row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dspark.draft.formats.stored import StoredDraft
from dspark.errors import CapabilityError
from dspark.target import SharesHeadRows

__all__ = ["Lender", "Parts", "settle_parts"]

Lender = Callable[[torch.dtype], SharesHeadRows]
"""Loads the target in a dtype, the draft's own, when something of it is needed."""

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a layout wants of embedding and head: True a copy, False the target's, None as it is."""

    embedding: bool | None = None
    head: bool | None = None


def settle_parts(
    draft: StoredDraft, wanted: Parts, lender: Lender, layout: str
) -> tuple[StoredDraft, list[str]]:
    """Give a draft the parts that a layout wants, or take them out.

    Args:
        draft: The draft.
        wanted: What the layout wants.
        lender: The target.
        layout: What errors call the layout.

    Returns:
        The draft, and a sentence for each change.

    Raises:
        CapabilityError: If a part to be taken out is not the target's, or one to be copied does
            not fit the draft.
    """
    notes: list[str] = []
    if wanted.embedding is True and not draft.has_embedding:
        draft = _with(draft, _EMBEDDING, _embedding(draft, lender, layout), "owns_embedding")
        notes.append("the embedding is a copy of the target's.")
    elif wanted.embedding is False and draft.has_embedding:
        _same(draft, _EMBEDDING, _embedding(draft, lender, layout), layout)
        draft = _without(draft, _EMBEDDING, "owns_embedding")
        notes.append("the draft's embedding is the target's, and was left out.")
    if wanted.head is True and not draft.has_head:
        draft = _with(draft, _HEAD, _head(draft, lender, layout), "owns_head")
        rows = draft.tensors[_HEAD].shape[0]
        notes.append(f"the output head is a copy of {rows} rows of the target's.")
    elif wanted.head is False and draft.has_head:
        _same(draft, _HEAD, _head(draft, lender, layout), layout)
        draft = _without(draft, _HEAD, "owns_head")
        notes.append("the draft's output head is the target's, and was left out.")
    return draft, notes


def _embedding(draft: StoredDraft, lender: Lender, layout: str) -> Tensor:
    config: Any = draft.config
    _refuse(layout, "embed_scale", config.embed_scale, config.embed_scale != 1)
    with torch.no_grad():
        return lender(draft.dtype).embed(torch.arange(config.vocab_size)).cpu()


def _head(draft: StoredDraft, lender: Lender, layout: str) -> Tensor:
    config: Any = draft.config
    rows = lender(draft.dtype).head_rows(draft.vocab.ids)
    _refuse(layout, "bias of the target's head", "set", rows.bias is not None)
    _refuse(
        layout,
        "logit_softcap",
        rows.softcap,
        rows.softcap != config.logit_softcap and not draft.has_head,
    )
    return rows.weight.detach().cpu()


def _with(draft: StoredDraft, name: str, tensor: Tensor, flag: str) -> StoredDraft:
    hidden = getattr(getattr(draft.config, "backbone", draft.config), "hidden_size", 0)
    if tensor.shape[1] != hidden:
        raise CapabilityError(
            f"hidden_size of the draft is {hidden}, but {name.partition('.')[0]} of the target has "
            f"{tensor.shape[1]}."
        )
    tensors = {**draft.tensors, name: tensor.to(draft.dtype)}
    return replace(draft, tensors=tensors, config=_flagged(draft.config, flag, True))


def _without(draft: StoredDraft, name: str, flag: str) -> StoredDraft:
    tensors = {key: tensor for key, tensor in draft.tensors.items() if key != name}
    return replace(draft, tensors=tensors, config=_flagged(draft.config, flag, False))


def _flagged(config: Any, flag: str, value: bool) -> Any:
    if hasattr(config, flag):
        return replace(config, **{flag: value})
    # EAGLE-3 always stores a head and says only whether there is an embedding.
    return replace(config, has_embedding=value) if flag == "owns_embedding" else config


def _same(draft: StoredDraft, name: str, theirs: Tensor, layout: str) -> None:
    mine = draft.tensors[name]
    if mine.shape != theirs.shape or not torch.equal(mine, theirs.to(mine.dtype)):
        raise CapabilityError(
            f"{name} of the draft is not the target's, but {layout} has no place for it and uses "
            "the target's."
        )


def _refuse(layout: str, field: str, value: object, is_wrong: bool) -> None:
    if is_wrong:
        raise CapabilityError(
            f"{field} is {value!r}, but a copy of the target's for {layout} cannot have it."
        )
