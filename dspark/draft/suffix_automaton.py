"""Suffix automaton of a request's own text: which endings occurred before, and what followed them.

The lookup drafter (draft/lookup.py) says what is kept per state and why; kernels/automaton.h is the
same in C++.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["MAX_LINKS", "SuffixAutomaton"]

MAX_LINKS = 32
"""Suffix links that an occurrence is counted along."""

_ROOT = 0


class SuffixAutomaton:
    """Online suffix automaton with occurrence counts and latest positions.

    State 0 is the root. Every state stands for a set of substrings that end at the same places.

    Attributes:
        size: Tokens seen.
        last: State of the whole text.
        next: Transitions of each state, {token: state}.
        link: Suffix link of each state, -1 for the root.
        length: Length of the longest substring of each state.
        count: Occurrences of a state's substrings (low for short endings after long repetitions).
        latest: Position of the last token of their latest occurrence.

    **Source:** Blumer et al. 1985, The smallest automaton recognizing the subwords of a text.
    """

    __slots__ = ("count", "last", "latest", "length", "link", "next", "size")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.size = 0
        self.last = _ROOT
        self.next: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.count = [0]
        self.latest = [-1]
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens; amortised constant time each."""
        nexts, links, lengths = self.next, self.link, self.length
        counts, latest = self.count, self.latest
        for token in tokens:
            state, new = self.last, len(nexts)
            nexts.append({})
            links.append(_ROOT)
            lengths.append(lengths[state] + 1)
            counts.append(0)
            latest.append(-1)
            while state >= 0 and token not in nexts[state]:
                nexts[state][token] = new
                state = links[state]
            if state >= 0:
                links[new] = self._split(state, token)
            self.last = state = new
            position, steps = self.size, MAX_LINKS
            while state > 0 and steps:
                counts[state] += 1
                latest[state] = position
                state = links[state]
                steps -= 1
            self.size += 1

    def _split(self, state: int, token: int) -> int:
        """The state of exactly state's longest substring + token, cloned off if need be."""
        follower = self.next[state][token]
        if self.length[follower] == self.length[state] + 1:
            return follower
        clone = len(self.next)
        self.next.append(self.next[follower].copy())
        self.length.append(self.length[state] + 1)
        self.count.append(self.count[follower])
        self.latest.append(self.latest[follower])
        self.link.append(self.link[follower])
        self.link[follower] = clone
        while state >= 0 and self.next[state].get(token) == follower:
            self.next[state][token] = clone
            state = self.link[state]
        return clone

    def repeated_suffix(self) -> tuple[int, int]:
        """State and length of the longest suffix of the text that occurred before; (0, 0): none."""
        state = max(self.link[self.last], _ROOT)
        return state, self.length[state]

    def step(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Lengthen a match by a token, or shorten it from the left until that works.

        Args:
            state: State of the text matched so far.
            length: How many of its last tokens are matched.
            token: The token that follows.

        Returns:
            State and length of the longest match that ends with `token`; (0, 0) if it is new.
        """
        while token not in self.next[state]:
            state = self.link[state]
            if state < 0:
                return _ROOT, 0
            length = self.length[state]
        return self.next[state][token], length + 1
