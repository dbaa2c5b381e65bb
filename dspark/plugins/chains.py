"""Chains of the lookup drafter for texts that another engine keeps.

The engine shows the whole text so far in every round. The text may have grown, been cut back, or
be another one; a suffix automaton can only grow. So what the drafter reads is a text of its own:
where the engine's text departs from what was read, a separator and the last tokens before the
departure are appended, then the new ones. The departed branch stays behind as a source (a second
answer to the same prompt drafts from the first), and nothing is read twice but those few tokens.

**Length of a chain.** A chain of n drafted tokens with survivals s_1 >= s_2 >= ... costs 1 + c n
forwards of one token and yields 1 + s_1 + ... + s_n tokens on average, so it is lengthened as long
as that ratio rises. c is the row cost: what one more row adds to a forward of one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark.draft.base import DraftContext, Drafter
from dspark.draft.lookup import LookupConfig, LookupDrafter
from dspark.errors import ConfigError
from dspark.request import Rule, SamplingParams
from dspark.verify.noise import NoiseKey

__all__ = ["Chain", "ChainLookup", "ChainSettings", "paying_length"]

IntArray = NDArray[np.integer]

_SEPARATOR = -1  # no token; a match across it is none
_LEAD = 32  # tokens before a departure that are read again, so that matches reach behind it
_PARAMS = SamplingParams()
_NOISE = NoiseKey(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSettings:
    """How long chains may be, and what is kept to draft from.

    Attributes:
        max_tokens: Tokens of a chain at the most, >= 1.
        min_match: Tokens of the text's ending that must have occurred before, >= 1. Where there is
            a corpus one is enough.
        row_cost: Cost of one more row in a forward, in forwards of one row, in [0, 1]. 0 drafts
            as far as there is anything to offer.
        keep: Tokens of departed texts to keep as a source, >= 0.
        sure: Survival of the first token from which a second drafter is not asked, in [0, 1].

    Raises:
        ConfigError: If a value is outside its range.
    """

    max_tokens: int = 10
    min_match: int = 2
    row_cost: float = 0.2
    keep: int = 16384
    sure: float = 0.6

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("min_match", 1), ("keep", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}, but must be an integer >= {least}.")
        for name in ("row_cost", "sure"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be in [0, 1].")


@dataclass(frozen=True, slots=True)
class Chain:
    """Drafted tokens.

    Attributes:
        tokens: In order.
        survival: Estimated probability that the target takes each, not rising.
    """

    tokens: list[int]
    survival: list[float]

    def cut(self, length: int) -> Chain:
        """The first `length` tokens."""
        return Chain(self.tokens[:length], self.survival[:length])


def paying_length(survival: Iterable[float], row_cost: float) -> int:
    """How many tokens of a chain are worth their rows.

    Args:
        survival: Of each token, not rising.
        row_cost: Cost of one more row, in forwards of one row.

    Returns:
        The n that maximises (1 + s_1 + ... + s_n) / (1 + n * row_cost).
    """
    length, gain, cost = 0, 1.0, 1.0
    for value in survival:
        if value * cost <= gain * row_cost:
            break
        length, gain, cost = length + 1, gain + value, cost + row_cost
    return length


class _Text:
    """One text of the engine, and what the drafter was given of it."""

    __slots__ = ("given", "seen")

    def __init__(self) -> None:
        self.seen: IntArray = np.zeros(0, dtype=np.int64)
        self.given: list[int] = []

    def follow(self, tokens: IntArray, keep: int) -> bool:
        """Take in the text as it is now; False if the drafter has to begin anew."""
        known, size = len(self.seen), len(tokens)
        common = min(known, size)
        if not np.array_equal(self.seen[:common], tokens[:common]):
            common = int(np.argmax(self.seen[:common] != tokens[:common]))
        goes_on = True
        if common == known:
            self.given.extend(tokens[known:].tolist())
        else:
            again = tokens[max(0, common - _LEAD) :].tolist()
            if len(self.given) + 1 + len(again) <= size + keep:
                self.given.append(_SEPARATOR)
                self.given.extend(again)
            else:
                goes_on = False
                self.given = tokens.tolist()
        self.seen = np.array(tokens)  # the engine goes on writing into its own
        return goes_on


class ChainLookup:
    """Drafts chains for any number of texts.

    Args:
        settings: Lengths and limits.
        corpus: Further texts (token ids) to draft from.
        vocab_size: Ids from here on are never offered; None checks nothing.
        second: Asked where lookup is not sure of its first token; it must not need the target's
            hidden states.

    Raises:
        ConfigError: If a corpus has an id outside the vocabulary, or the second drafter needs
            hidden states.
    """

    def __init__(
        self,
        settings: ChainSettings | None = None,
        *,
        corpus: Sequence[Sequence[int]] = (),
        vocab_size: int | None = None,
        second: Drafter | None = None,
    ) -> None:
        self.settings = settings or ChainSettings()
        self._vocab_size = vocab_size
        largest = max((max(text) for text in corpus if len(text)), default=0)
        if vocab_size is not None and largest >= vocab_size:
            raise ConfigError(
                f"the corpus has token {largest}, but the vocabulary ends at {vocab_size - 1}."
            )
        if second is not None and second.capture:
            raise ConfigError(
                f"drafter {second.name} reads the target's hidden states, which other engines do "
                "not hand out.",
                hint="give a draft model, or none",
            )
        config = LookupConfig(min_match=self.settings.min_match, width=1)
        self._lookup = LookupDrafter(config, corpus=corpus)
        self._second = second
        self._texts: dict[int, _Text] = {}
        self._round = 0

    def draft(self, text_id: int, tokens: IntArray, *, room: int | None = None) -> Chain:
        """Draft what may follow.

        Args:
            text_id: Names the text from call to call.
            tokens: int [n], the whole text so far; not changed and not kept.
            room: Tokens to offer at the most, None for the settings' `max_tokens`.

        Returns:
            The chain, possibly empty.
        """
        settings = self.settings
        most = settings.max_tokens if room is None else min(room, settings.max_tokens)
        text = self._texts.setdefault(text_id, _Text())
        if not text.follow(tokens, settings.keep):
            self._lookup.release(text_id)
        if most < 1 or not len(tokens):
            return Chain([], [])
        self._round += 1
        chain = self._ask(self._lookup, text_id, text.given, most)
        if self._second is not None and (not chain.tokens or chain.survival[0] < settings.sure):
            other = self._ask(self._second, text_id, tokens.tolist(), most)
            if other.tokens and sum(other.survival) > sum(chain.survival):
                chain = other
        return chain.cut(paying_length(chain.survival, settings.row_cost))

    def shows(self, text_id: int, tokens: IntArray) -> bool:
        """Whether `tokens` is the whole text of the last `draft` for this id."""
        text = self._texts.get(text_id)
        return text is not None and np.array_equal(text.seen, tokens)

    def release(self, text_id: int) -> None:
        """Forget a text; unknown ids are ignored."""
        self._texts.pop(text_id, None)
        self._lookup.release(text_id)
        if self._second is not None:
            self._second.release(text_id)

    def _ask(self, drafter: Drafter, text_id: int, tokens: Sequence[int], most: int) -> Chain:
        context = DraftContext(
            request_id=text_id,
            tokens=tokens,
            prompt_length=len(tokens),
            params=_PARAMS,
            rule=Rule.GREEDY,
            noise=_NOISE,
            round=self._round,
            budget=most,
            depth=most,
            width=1,
        )
        tree = drafter.propose([context])[0].tree
        ids, end = tree.token.tolist(), self._vocab_size
        if end is not None:
            ids = ids[: next((i for i, token in enumerate(ids) if token >= end), len(ids))]
        return Chain(ids, tree.survival.tolist()[: len(ids)])
