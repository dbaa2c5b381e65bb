"""Drafter `lookup`: continue the text as it went on where its ending occurred before.

A suffix automaton of prompt and output, extended token by token, knows the longest ending of the
text that occurred before in O(1) (the suffix link of its last state), every token that ever
followed it (the state's transitions) and, through further suffix links, what followed shorter
endings. Where occurrences disagree the proposal branches.

**What is kept per state, and why.** Occurrence counts and last positions are not free in an online
automaton: a new occurrence of an ending is one of all its endings. They are updated along the
suffix links of each new state, a handful in natural text; the walk stops after `MAX_LINKS`, so
that a text of one repeated token stays linear, at the price of low counts of its short endings.
Counts of a transition are then exact and cost nothing at drafting time, where a list of end
positions or a hash of n-grams would have to be scanned, with a cap, in every round.

**Survival.** Candidates of a node are blended over its matches, longest first, as in prediction by
partial matching (Cleary and Witten 1984): a match of length L that was followed n times by d
different tokens takes the share n L / (n L + _DOUBT d) of what longer matches left over, and gives
it to its followers by their counts, the latest one counting twice. On 150 answers of a 135 M chat
model (41 826 positions, greedy) candidates given .14, .51, .75 and .99 on average were right in
.16, .52, .75 and .98 of the cases. The default least match of 2 comes from the same texts: the
first candidate after a longest match of 1, 2, 3, 5, 8 tokens was right in .24, .54, .66, .79, .87
of the cases (sampled at 0.8: .21, .46, .56, .69, .81), so from 2 on it pays for its row.

**In C++.** Where a compiler is at hand `LookupDrafter` takes kernels (draft/native_lookup.py), all
requests of a round in one call. What stands here is what they compute, and the path without them;
tests/draft/test_native_lookup.py holds the two against each other, bit by bit.

**Source:** Blumer et al. 1985 (suffix automaton); Saxena 2023 (prompt lookup decoding);
SuffixDecoding, arXiv 2411.04975 (trees by count, shared corpus); SAM decoding, arXiv 2411.10666.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest

import numpy as np

from dspark.draft.base import DraftContext
from dspark.draft.corpus import MOST, Corpus, Place
from dspark.draft.native_lookup import Limits, NativeLookup, Reader, choose_library
from dspark.draft.suffix_automaton import MAX_LINKS, SuffixAutomaton
from dspark.errors import ConfigError
from dspark.request import Rule
from dspark.tree import POINT_MASS, DraftTree, Proposal
from dspark.tree_build import Candidates, TreeGrower, best_first

__all__ = ["LookupConfig", "LookupDrafter", "SuffixAutomaton"]

_MAX_MATCHES = 8  # suffix links looked at for one node's candidates
_MAX_FOLLOWERS = 16  # candidates of one match looked at
_LEFTOVER = 0.02  # shorter matches are not looked at for less than this
_DOUBT = 4.0
_SHARED_DOUBT = 20.0  # of texts that are not the request's own


@dataclass(frozen=True, slots=True)
class Match:
    """An ending of the text that occurred before, and what followed it.

    Attributes:
        length: Its tokens.
        followers: (token, occurrences).
        newest: What followed it last, None if that is not known.
    """

    length: int
    followers: Sequence[tuple[int, int]]
    newest: int | None = None
    doubt: float = _DOUBT


def _own_matches(
    automaton: SuffixAutomaton, state: int, length: int, least: int
) -> Iterator[Match]:
    """Matches of at least `least` tokens in a request's own text, longest first."""
    counts, latest = automaton.count, automaton.latest
    while length >= least:
        followers = [item for item in automaton.next[state].items() if item[0] >= 0]
        if len(followers) > _MAX_FOLLOWERS:
            followers = nlargest(_MAX_FOLLOWERS, followers, key=lambda item: counts[item[1]])
        newest = max(followers, key=lambda item: latest[item[1]])[0] if followers else None
        yield Match(length, [(token, counts[child]) for token, child in followers], newest)
        state = automaton.link[state]
        length = automaton.length[state]


def _shared_matches(corpus: Corpus, places: Sequence[Place], least: int) -> Iterator[Match]:
    """Matches of at least `least` tokens in the corpus, longest first."""
    for place in places:
        if place[2] < least:
            return
        yield Match(place[2], corpus.followers(place, _MAX_FOLLOWERS), doubt=_SHARED_DOUBT)


def _merged(own: Iterator[Match], shared: Iterator[Match]) -> Iterator[Match]:
    """All matches, longest first; the request's own text wins ties."""
    heads = [next(own, None), next(shared, None)]
    sources = (own, shared)
    for _ in range(_MAX_MATCHES):
        lengths = [0 if head is None else head.length for head in heads]
        best = int(lengths[1] > lengths[0])
        match = heads[best]
        if match is None:
            return
        yield match
        heads[best] = next(sources[best], None)


def blend(matches: Iterable[Match], width: int) -> list[tuple[int, float]]:
    """Candidates for the next token and their probabilities, best first.

    Args:
        matches: What the text's ending matches, longest first.
        width: Candidates to return at the most.

    Returns:
        (token, probability); the probabilities sum to less than 1.
    """
    share: dict[int, float] = {}
    left = 1.0
    for match in matches:
        if not match.followers:
            continue
        total = sum(count for _, count in match.followers) + (match.newest is not None)
        weight = total * match.length
        mass = left * weight / (weight + match.doubt * len(match.followers))
        for token, count in match.followers:
            value = count + (token == match.newest)
            share[token] = share.get(token, 0.0) + mass * value / total
        left -= mass
        if left < _LEFTOVER:
            break
    return nlargest(width, share.items(), key=lambda item: item[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupConfig:
    """Settings of the lookup drafter.

    Attributes:
        min_match: Tokens of the text's ending that must have occurred before, >= 1.
        min_shared: The same where there is a corpus, for both: it knows what mostly follows even a
            single token.
        width: Children per node at the most where the request does not say, >= 1.
        min_survival: Candidates less likely than this are not offered, in [0, 1).

    Raises:
        ConfigError: If a value is outside its range.
    """

    min_match: int = 2
    min_shared: int = 1
    width: int = 3
    min_survival: float = 0.02

    def __post_init__(self) -> None:
        for name in ("min_match", "min_shared", "width"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}, but must be an integer >= 1.")
        if not 0 <= self.min_survival < 1:
            raise ConfigError(f"min_survival is {self.min_survival}, but must be in [0, 1).")


class _RequestState(Reader):
    """A request's own automaton, and where its text's endings stand in the corpus."""

    __slots__ = ("corpus", "own", "places")

    def __init__(self, corpus: Corpus) -> None:
        super().__init__()
        self.own = SuffixAutomaton()
        self.corpus = corpus
        self.places: tuple[Place, ...] = ()

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in a text that extends what was seen."""
        new = self.follow(tokens)
        self.own.extend(new)
        if len(new) >= MOST:
            self.places = self.corpus.endings(new)
        elif self.corpus.size:
            for token in new:
                self.places = self.corpus.follow(self.places, token)


class LookupDrafter:
    """Offers the continuations of earlier occurrences of the text's ending.

    Args:
        config: Settings.
        corpus: Texts (token ids) that every request may continue from besides its own, for
            instance earlier answers of the target.
        name: What reports call it.
        path: Whether to draft in C++ (`dspark.native.PATHS`): "auto" does where it can. What is
            offered is the same.

    Raises:
        ConfigError: If a token of the corpus is negative, or the path is none of PATHS.
        CapabilityError: If kernels were asked for and cannot be had.
    """

    def __init__(
        self,
        config: LookupConfig | None = None,
        *,
        corpus: Corpus | Sequence[Sequence[int]] = (),
        name: str = "lookup",
        path: str = "auto",
    ) -> None:
        self._config = config or LookupConfig()
        self._name = name
        self._states: dict[int, _RequestState] = {}
        self._corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
        self._least = self._config.min_shared if self._corpus.size else self._config.min_match
        library = choose_library(path)
        self._native: NativeLookup | None = None
        if library is not None:
            limits = Limits(
                links=MAX_LINKS,
                matches=_MAX_MATCHES,
                followers=_MAX_FOLLOWERS,
                least=self._least,
                leftover=_LEFTOVER,
                doubt=_DOUBT,
                shared_doubt=_SHARED_DOUBT,
                min_survival=self._config.min_survival,
            )
            self._native = NativeLookup(library, limits, self._corpus)

    @property
    def texts_kept(self) -> int:
        """Requests that it keeps a text of."""
        return len(self._states) if self._native is None else self._native.texts_kept

    @property
    def name(self) -> str:
        """What reports call it."""
        return self._name

    @property
    def capture(self) -> tuple[int, ...]:
        """It needs no hidden states."""
        return ()

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        """Draft for several requests; empty where no ending of the least length occurred before.

        Under the rejection and block rules every node is offered with certainty (POINT_MASS):
        candidates follow from the context alone, nothing is drawn. The block rule gets a chain.

        Args:
            contexts: One per request.

        Returns:
            One proposal each.

        Raises:
            ConfigError: If a budget or a depth is under 0, or a width under 1.
            DataError: If a text holds what is no token id.
        """
        widths = [self._width(context) for context in contexts]
        if self._native is not None:
            return self._native.propose(contexts, widths)
        return [self._propose(*pair) for pair in zip(contexts, widths, strict=True)]

    def release(self, request_id: int) -> None:
        """Forget a request; unknown ids are ignored."""
        self._states.pop(request_id, None)
        if self._native is not None:
            self._native.release(request_id)

    def _width(self, context: DraftContext) -> int:
        """Children per node at the most."""
        width = context.width
        if width is None:
            width = self._config.width
        if width < 1 or context.budget < 0 or context.depth < 0:
            raise ConfigError(
                f"a draft of budget {context.budget}, depth {context.depth} and width {width} was "
                "asked for, but they must be >= 0, >= 0 and >= 1."
            )
        return 1 if context.rule is Rule.BLOCK else width

    def _propose(self, context: DraftContext, width: int) -> Proposal:
        state = self._states.get(context.request_id)
        if state is None or not state.is_extended_by(context.tokens):
            state = self._states[context.request_id] = _RequestState(self._corpus)
        state.extend(context.tokens)
        tree = self._grow(state, context, width)
        law_of = np.full(
            tree.num_nodes if context.rule.draws_from_laws else 0, POINT_MASS, dtype=np.int64
        )
        return Proposal(tree, law_of=law_of)

    def _grow(self, state: _RequestState, context: DraftContext, width: int) -> DraftTree:
        own, corpus, config = state.own, state.corpus, self._config
        at = {-1: (own.repeated_suffix(), state.places)}
        least = self._least
        longest_shared = state.places[0][2] if state.places else 0
        if max(at[-1][0][1], longest_shared) < least:
            return DraftTree.empty()

        def candidates(grown: TreeGrower, node: int) -> Candidates:
            if node >= 0:
                token = grown.token[node]
                above, places = at[grown.parent[node]]
                shared = corpus.follow(places, token) if corpus.size else ()
                at[node] = (own.step(*above, token), shared)
            here, there = at[node]
            matches = _merged(
                _own_matches(own, *here, least),
                _shared_matches(corpus, there, least),
            )
            worth = 1.0 if node < 0 else grown.survival[node]
            ranked = [c for c in blend(matches, width) if worth * c[1] >= config.min_survival]
            return [token for token, _ in ranked], [share for _, share in ranked]

        return best_first(
            lambda grown, nodes: [candidates(grown, node) for node in nodes],
            budget=context.budget,
            depth=context.depth,
            width=width,
        )
