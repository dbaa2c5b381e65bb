"""What a caller asks for and what comes back: parameters, results and statistics.

Counting (the same everywhere in dspark): the anchor, the last committed token that has not run
through the target yet, is a row of the verify batch and not a node; drafted nodes start at depth 1;
a tree's budget counts drafted nodes; the closing token is what the target adds at the end of a
round; `accept_len` is the drafted tokens accepted in a round; tau is committed tokens / rounds,
closing token included, the token that prefill yields not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

from dspark.errors import ConfigError

if TYPE_CHECKING:
    from dspark.verify.constraint import Constraint

__all__ = [
    "FinishReason",
    "GenerationResult",
    "Message",
    "Prompt",
    "RequestStats",
    "RoundStats",
    "Rule",
    "SamplingParams",
    "TokenLogprob",
]

Message: TypeAlias = Mapping[str, object]
"""One chat message: {"role": ..., "content": ...} as chat templates take them."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""Raw text, token ids, or a list of chat messages."""


class Rule(StrEnum):
    """How drafted tokens are accepted (docs/losslessness.md)."""

    GREEDY = "greedy"
    COUPLED = "coupled"
    SAMPLE_MATCH = "sample-match"
    REJECTION = "rejection"
    BLOCK = "block"

    @property
    def draws_from_laws(self) -> bool:
        """True for rules that need the law each drafted token was drawn from."""
        return self is Rule.REJECTION or self is Rule.BLOCK


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # an end token, a stop string
    LENGTH = "length"  # max_tokens or the context limit
    CANCELLED = "cancelled"
    ERROR = "error"


_LARGEST_TREE = 4096


def _check(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}, but must be {allowed}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to decode one request.

    Attributes:
        max_tokens: Tokens to generate at the most, >= 1.
        temperature: >= 0; 0 is greedy decoding.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose mass reaches top_p, in (0, 1].
        min_p: Drop tokens under min_p times the likeliest token's probability, in [0, 1].
        seed: Seed of the request's noise; None draws one per request.
        stop: Strings that end the text; they are not part of it.
        n: Samples per prompt, >= 1.
        logprobs: None, or how many alternatives (>= 0) to report beside each token's own.
        ignore_eos: Go on after an end-of-text token.
        repetition_penalty: > 0; 1 is off; counts prompt and output.
        presence_penalty: In [-2, 2]; 0 is off; counts output only.
        frequency_penalty: In [-2, 2]; 0 is off; counts output only.
        logit_bias: Added to the logits of these token ids, in [-100, 100].
        bad_words: Texts that must not appear (exact token sequences of each, with and without
            a leading space).
        grammar: What the text must conform to: a `dspark.grammar.Grammar`, or any other
            `dspark.verify.constraint.Constraint`; None for any text.
        rule: A value of `Rule`, or "auto": greedy at temperature 0, else coupled.
        draft: False decodes this request plainly, tokens that a grammar forces included.
        depth: Longest drafted path, None for the drafter's own choice.
        width: Children per node at the most (1 is a chain), None for the drafter's own choice.
        tree_budget: Drafted nodes per round at the most (0 is plain decoding), None for the
            engine's own choice.

    Raises:
        ConfigError: If a value is outside its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: tuple[str, ...] = ()
    grammar: Constraint | None = None
    rule: str = "auto"
    draft: bool = True
    depth: int | None = None
    width: int | None = None
    tree_budget: int | None = None

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_law()
        self._check_texts()
        self._check_grammar()
        self._check_draft()

    def _check_lengths(self) -> None:
        _check(_is_count(self.max_tokens, 1), "max_tokens", self.max_tokens, "an integer >= 1")
        _check(_is_count(self.n, 1), "n", self.n, "an integer >= 1")
        ok = self.logprobs is None or _is_count(self.logprobs, 0)
        _check(ok, "logprobs", self.logprobs, "None or an integer >= 0")
        ok = self.seed is None or (_is_count(self.seed, 0) and self.seed < 2**64)
        _check(ok, "seed", self.seed, "None or an integer from 0 to 2**64 - 1")

    def _check_law(self) -> None:
        number, t = _is_number, self.temperature
        _check(number(t) and t >= 0, "temperature", t, "a number >= 0")
        _check(_is_count(self.top_k, 0), "top_k", self.top_k, "an integer >= 0 (0 keeps all)")
        _check(number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _check(number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        penalty = self.repetition_penalty
        _check(number(penalty) and penalty > 0, "repetition_penalty", penalty, "a number > 0")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(number(value) and -2 <= value <= 2, name, value, "in [-2, 2]")
        for token, bias in (self.logit_bias or {}).items():
            ok = _is_count(token, 0) and number(bias) and -100 <= bias <= 100
            _check(ok, "logit_bias", {token: bias}, "token ids >= 0 mapped to [-100, 100]")

    def _check_texts(self) -> None:
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, (value,))
                value = (value,)
            ok = isinstance(value, tuple | list) and all(isinstance(s, str) and s for s in value)
            _check(ok, name, value, "a sequence of non-empty strings")
            object.__setattr__(self, name, tuple(value))

    def _check_grammar(self) -> None:
        grammar = self.grammar
        ok = grammar is None or callable(getattr(grammar, "start", None))
        _check(ok, "grammar", grammar, "None or a constraint such as dspark.grammar.Grammar")
        if grammar is not None and self.ignore_eos:
            raise ConfigError(
                "ignore_eos was given with a grammar, but a text that has come to its end allows "
                "nothing else.",
                hint="leave out ignore_eos",
            )

    def _check_draft(self) -> None:
        rules = ["auto", *(rule.value for rule in Rule)]
        value = self.rule.value if isinstance(self.rule, Rule) else self.rule
        _check(value in rules, "rule", value, "one of " + ", ".join(rules))
        object.__setattr__(self, "rule", value)
        for name, least in (("depth", 1), ("width", 1), ("tree_budget", 0)):
            value = getattr(self, name)
            ok = value is None or (_is_count(value, least) and value <= _LARGEST_TREE)
            _check(ok, name, value, f"None or an integer from {least} to {_LARGEST_TREE}")

    @property
    def resolved_rule(self) -> Rule:
        """The rule in force: greedy at temperature 0, coupled where `rule` is "auto"."""
        if self.temperature == 0:
            return Rule.GREEDY
        if self.rule == "auto":
            return Rule.COUPLED
        if self.rule == Rule.GREEDY.value:
            raise ConfigError(
                f"rule is 'greedy' with temperature {self.temperature}, but greedy needs 0.",
                hint="leave out the rule, or set the temperature to 0",
            )
        return Rule(self.rule)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one generated token under the target's own law.

    Taken from the raw logits (temperature 1, before any processor), natural logarithm, so that
    speculative and plain decoding report the same figure.

    Attributes:
        token_id: The token.
        logprob: Its log-probability.
        top: The likeliest alternatives, (token id, log-probability), best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RoundStats:
    """One round of one request.

    Attributes:
        proposed: Nodes the drafter offered.
        verified: Nodes that were run through the target.
        accepted: Drafted tokens accepted (accept_len).
        committed: Tokens added to the output, closing token included.
        depth: Depth of the verified tree.
        tried: Deepest depth at which the rule looked at a candidate.
        path: Length of the path the rule accepted; above `accepted` where the text ended inside.
        survival: Survival, as the drafter saw it, of the nodes of the tree's likeliest chain: from
            depth 1 on, always the child of highest survival.
        matched: How many of these, from depth 1 on, were accepted.
        nodes: Of a tree with branches, every node in order: its parent's index (-1 for the anchor),
            its survival, and whether it was accepted. Empty for a chain, which `survival` and
            `matched` describe.
        forced: How many nodes at the tree's beginning the request's grammar forced: a chain of
            survival 1, from depth 1 on, that no drafter had to offer.

    Where the text ended inside the accepted path, `tried`, `survival`, `matched` and `nodes` end
    there too.
    """

    proposed: int
    verified: int
    accepted: int
    committed: int
    depth: int
    tried: int = 0
    path: int = 0
    survival: tuple[float, ...] = ()
    matched: int = 0
    nodes: tuple[tuple[int, float, bool], ...] = ()
    forced: int = 0


@dataclass(slots=True)
class RequestStats:
    """What speculation did for one request.

    Attributes:
        prompt_tokens: Tokens in the prompt.
        shared_prefix: Prompt tokens whose K/V came from another request.
        output_tokens: Tokens generated.
        rounds: Rounds run (the token that prefill yields takes none).
        proposed: Nodes drafted; those that a grammar ruled out at once are not counted.
        verified: Nodes run through the target.
        accepted: Drafted tokens accepted.
        forced: Tokens among these that no drafter had to offer: a grammar left nothing else. They
            count in `proposed` and `verified` as well.
        committed: Tokens committed by rounds, closing tokens included.
        accepted_at_depth: Rounds that accepted a token at depth 1, 2, ...
        verified_at_depth: Rounds that verified at least one node at depth 1, 2, ...
        seconds_draft: Seconds in the drafter (its share of a batch).
        seconds_verify: Seconds in target forwards of rounds (its share of a batch).
        seconds_rest: Seconds of rounds outside both (its share of a batch).
        seconds_prefill: Seconds in prefill forwards.
        seconds_total: Wall-clock seconds from submission to the end.
        time_to_first_token: Wall-clock seconds from submission to the first token.
        seconds_waiting: Wall-clock seconds in the queue, before the first round and after
            preemptions.
        preemptions: Times it had to give its memory to others.
        recomputed_tokens: Tokens that were run again because of that.
        speculation_switched_off: Times that auto-off stopped drafting.
        round_log: One entry a round, kept if the engine was told to.
    """

    prompt_tokens: int = 0
    shared_prefix: int = 0
    output_tokens: int = 0
    rounds: int = 0
    proposed: int = 0
    verified: int = 0
    accepted: int = 0
    forced: int = 0
    committed: int = 0
    accepted_at_depth: list[int] = field(default_factory=list)
    verified_at_depth: list[int] = field(default_factory=list)
    seconds_draft: float = 0.0
    seconds_verify: float = 0.0
    seconds_rest: float = 0.0
    seconds_prefill: float = 0.0
    seconds_total: float = 0.0
    time_to_first_token: float = 0.0
    seconds_waiting: float = 0.0
    preemptions: int = 0
    recomputed_tokens: int = 0
    speculation_switched_off: int = 0
    round_log: list[RoundStats] = field(default_factory=list)

    @property
    def accepted_length(self) -> float:
        """Tau: committed tokens per round, closing token included; 0 before any round."""
        return self.committed / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per wall-clock second, prefill included; 0 before the end."""
        return self.output_tokens / self.seconds_total if self.seconds_total > 0 else 0.0


@dataclass(slots=True)
class GenerationResult:
    """One finished sample.

    Attributes:
        text: The generated text, without the prompt and without a stop string.
        token_ids: The generated token ids, a closing end token included.
        finish_reason: Why it ended.
        logprobs: One entry a token if asked for.
        error: One sentence if this prompt failed, else None.
        hint: What to do about the error, or None.
        stats: What speculation did.
        prompt_index: Index of the prompt in the list given.
        sample_index: 0 .. n-1.
        seed: The seed used (drawn if none was given); None at temperature 0.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None
    hint: str | None = None
    stats: RequestStats = field(default_factory=RequestStats)
    prompt_index: int = 0
    sample_index: int = 0
    seed: int | None = None
