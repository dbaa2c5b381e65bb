"""From a draft's raw logits to the children of a tree's nodes, as the target would shape them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch

from dspark.draft.base import DraftContext
from dspark.draft.grow import Growth
from dspark.errors import DsparkError
from dspark.verify import sampling

__all__ = ["WarnOnce", "feed", "history_of"]

_log = logging.getLogger(__name__)


class WarnOnce:
    """Says once, per kind, what keeps a drafter from drafting.

    Args:
        name: Of the drafter.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._said: set[str] = set()

    def __call__(self, what: str, detail: str) -> None:
        """Log a warning unless this was said before."""
        if what not in self._said:
            self._said.add(what)
            _log.warning("%s: %s: %s", self._name, what, detail)


def history_of(context: DraftContext) -> sampling.History | None:
    """What penalties and bad words look at, None where nothing does."""
    if not sampling.has_history(context.params):
        return None
    tokens, prompt = context.tokens, context.prompt_length
    return sampling.History(tokens[:prompt], tokens[prompt:])


def feed(
    growth: Growth,
    context: DraftContext,
    history: sampling.History | None,
    nodes: Sequence[int],
    logits: torch.Tensor,
    warn: WarnOnce,
    confidence: Sequence[float] | None = None,
) -> None:
    """Shape the rows of a request's nodes and hand them to its tree.

    Nodes whose logits are not finite, or cannot be shaped, are left without children; that asks
    only what was known before these are drawn.

    Args:
        growth: The tree.
        context: The request.
        history: From `history_of`.
        nodes: Nodes to expand, -1 for the anchor.
        logits: float [R, V], one row each, not shaped yet.
        warn: Where to complain.
        confidence: Confidence logit of every node, None without such a head.
    """
    is_sound = [math.isfinite(top) for top in logits.amax(dim=1).tolist()]
    if not all(is_sound):
        warn("the draft's logits are not finite", "no tokens are drafted after them.")
        nodes = [node for node, ok in zip(nodes, is_sound, strict=True) if ok]
        logits = logits[torch.tensor(is_sound, device=logits.device)]
        if confidence is not None:
            confidence = [c for c, ok in zip(confidence, is_sound, strict=True) if ok]
    if not nodes:
        return
    paths = histories = None
    if history is not None:
        histories = [history] * len(nodes)
        paths = [growth.tree.path_tokens(node) for node in nodes]
    try:
        params = [context.params] * len(nodes)
        shaped = sampling.shape_logits(logits, params, histories, paths)
    except DsparkError as error:  # the target will meet it too, and report it
        warn("the draft's logits cannot be shaped", error.message)
        return
    growth.take(nodes, shaped, confidence)
