"""Drafter protocol: from a request's context to a proposal.

A drafter sees the whole context of a request each round and keeps its own state in step with it;
what it offers may be wrong or slow but never changes the text (only rejected nodes cost time).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from dspark.request import Rule, SamplingParams
from dspark.tree import Proposal
from dspark.verify.noise import NoiseKey

if TYPE_CHECKING:
    import torch

    from dspark.verify.constraint import AllowedAfter

__all__ = ["DraftContext", "Drafter", "Observer", "SavesTime", "SharesContext"]


@dataclass(slots=True, kw_only=True)
class DraftContext:
    """What a drafter may know when it drafts for one request.

    Attributes:
        request_id: Stable for the life of the request.
        tokens: Prompt and output so far; the last one is the anchor. Read only.
        prompt_length: How many of `tokens` are the prompt.
        params: The request's sampling parameters.
        rule: The acceptance rule in force.
        noise: Key of the request's noise.
        round: Number of this round, from 1 (the token that prefill yields is drawn in round 0).
        budget: Nodes to offer at the most, >= 1.
        depth: Longest path to offer, >= 1.
        width: Children per node at the most, or None for the drafter's choice.
        features: Target hidden states of the tokens committed since the last call, if the drafter
            asked for them by `capture`: {layer: [n, D]}.
        node_seconds: Seconds that a further node adds to the round's forward; 0 where that is not
            known, or not to be looked at: what is measured may not decide what is drawn from laws.
        allowed: Which tokens the request's grammar lets follow a path of drafted tokens; None
            without a grammar. A drafter that draws from laws must draw from laws under this mask;
            one that offers candidates may ignore it, and loses those that are ruled out.
    """

    request_id: int
    tokens: Sequence[int]
    prompt_length: int
    params: SamplingParams
    rule: Rule
    noise: NoiseKey
    round: int
    budget: int
    depth: int
    width: int | None = None
    features: Mapping[int, torch.Tensor] | None = None
    node_seconds: float = 0.0
    allowed: AllowedAfter | None = None

    @property
    def output_position(self) -> int:
        """Output position t of the token that follows the anchor; depth 1 is drawn at it."""
        return len(self.tokens) - self.prompt_length


@runtime_checkable
class Drafter(Protocol):
    """Proposes token trees."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def capture(self) -> tuple[int, ...]:
        """Target layers whose hidden states it needs."""
        ...

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        """Draft for several requests at once; one proposal each, possibly empty."""
        ...

    def release(self, request_id: int) -> None:
        """Forget a request; unknown ids are ignored."""
        ...


@runtime_checkable
class Observer(Protocol):
    """A drafter that must see the hidden states even of rounds in which it does not draft.

    `DraftContext.features` holds what was committed since the last call. Whoever hands a context
    to one drafter and not to another (draft/combined.py) lets the other observe it.
    """

    def observe(self, contexts: Sequence[DraftContext]) -> None:
        """Take in the features of these contexts, and propose nothing."""
        ...


@runtime_checkable
class SharesContext(Protocol):
    """A drafter that needs no hidden states of what another request began with, too.

    The target takes over K/V of a beginning that it has seen, and has no hidden states to give for
    it. Prompts are run as a whole for drafters that read them and are not of this kind.

    Attributes:
        shares_context: Whether it can.
    """

    @property
    def shares_context(self) -> bool:
        """Whether it can: of several drafters, all that read hidden states have to."""
        ...

    def covered(self, tokens: Sequence[int]) -> int:
        """How many leading tokens of a text it could take over from others, live or ended."""
        ...

    def adopt(self, request_id: int, tokens: Sequence[int]) -> None:
        """Begin a request with these tokens, a beginning of what was asked of `covered`.

        What comes after them arrives as `DraftContext.features`, as ever.
        """
        ...


@runtime_checkable
class SavesTime(Protocol):
    """A drafter that can leave out work of its own that has not paid.

    Attributes:
        saves_time: Whether it does. An engine that switches off what does not pay sets it.
    """

    saves_time: bool
