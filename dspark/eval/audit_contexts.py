"""Where an audit looks: prompts of its own, and contexts at which a law is worth testing.

A context tells something about the rule if the drafter offers candidates there and the target is in
doubt: where one token is all but certain, hardly any sample is decided by the rule. Both are looked
for in the prompts, in plain continuations, and in a second beginning of the same prompt, where a
drafter that looks for repetitions has something to say while the target is not yet sure of it.

Letters: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch

from dspark.draft.base import DraftContext, Drafter
from dspark.engine import Engine, EngineConfig
from dspark.request import Rule, SamplingParams
from dspark.target import BatchPart, Target, TokenBatch
from dspark.verify.noise import NoiseKey

__all__ = ["TEXTS", "choose_contexts", "token_prompts"]

_CONTINUATION = 16  # plain tokens after a prompt
_REPEATED = 12  # tokens of the prompt's second beginning
_LOOKED_AT = 192  # last positions of a text
_CHUNK = 64  # rows whose logits are asked for at once
_ROOM = 32  # positions that samples may need after a context
_PROBE_ID = -1  # no request's
_LIKELIEST = math.log(0.5)  # of the best token where a rule has most to decide

TEXTS = (
    "Copy this list of cities exactly, three times: Lisbon, Porto, Braga, Coimbra, Faro, Evora.\n"
    "Lisbon, Porto, Braga,",
    "def average(values):\n    total = 0.0\n    for value in values:\n        total =",
    "The committee met on Tuesday. The treasurer reported that the fees had been paid. The",
    "A fox who wanted to learn to sail went down to the harbour and",
    "Q: What is 17 times 24? A: 17 times 20 is 340, and 17 times 4 is 68, so 17 times 24 is",
    '{"name": "Ada", "age": 36}, {"name": "Alan", "age": 41}, {"name": "Grace", "age":',
)


def token_prompts(vocab_size: int, count: int) -> list[list[int]]:
    """Prompts of token ids for targets without a tokenizer: a pattern that repeats."""
    span = max(1, min(vocab_size - 4, 1000))
    return [[3 + (7 * i + j * j) % span for j in range(8 + i)] * 2 for i in range(count)]


def choose_contexts(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    params: SamplingParams,
) -> list[list[int]]:
    """Choose contexts at which the drafter offers something and the target is in doubt.

    Args:
        target: The target.
        drafter: The drafter.
        prompts: Token lists.
        count: Contexts to choose at the most.
        params: How to sample the continuations; seed and temperature count.

    Returns:
        Contexts of at least two tokens, spread over the prompts; those at which nothing is drafted
        only if there are no others.
    """
    own = SamplingParams(
        max_tokens=_CONTINUATION,
        temperature=params.temperature,
        seed=params.seed,
        ignore_eos=True,
    )
    plain = Engine(target, config=EngineConfig(auto_off=False))
    ranked: list[tuple[float, int, list[int]]] = []
    for result in plain.generate([list(prompt) for prompt in prompts], own):
        prompt = list(prompts[result.prompt_index])
        text = (prompt + result.token_ids + prompt[:_REPEATED])[: target.info.max_positions]
        for end, best in _likeliest(target, text):
            if 2 <= end <= target.info.max_positions - _ROOM:
                ranked.append((abs(best - _LIKELIEST), result.prompt_index, text[:end]))
    ranked.sort(key=lambda entry: entry[0])
    chosen = _spread(ranked, count, drafter)
    return chosen or _spread(ranked, count, None)


def _likeliest(target: Target, text: Sequence[int]) -> Iterable[tuple[int, float]]:
    """Log-probability of the likeliest token after text[:end], for the last ends."""
    cache = target.new_cache()
    slot, _ = cache.open([text[0]])
    first = max(0, len(text) - _LOOKED_AT)
    bounds = [*range(0, first, 512), *range(first, len(text), _CHUNK), len(text)]
    for start, stop in pairwise(bounds):
        rows = range(stop - start) if start >= first else range(0)
        chain = BatchPart.chain(slot, text[start:stop], start, want_last=False)
        part = BatchPart(slot, chain.token_ids, chain.positions, chain.parent, rows)
        cache.reserve(slot, stop - start)
        logits = target.forward(TokenBatch.build([part]), cache).logits
        cache.commit(slot, range(stop - start))
        if len(rows):
            best = torch.log_softmax(logits.float(), dim=1).amax(dim=1).tolist()
            yield from zip(range(start + 1, stop + 1), best, strict=True)


def _spread(
    ranked: Sequence[tuple[float, int, list[int]]], count: int, drafter: Drafter | None
) -> list[list[int]]:
    """The best contexts, from as many prompts as there are; a drafter must draft there."""
    chosen: list[list[int]] = []
    used: dict[int, int] = {}
    silent: set[int] = set()
    for most in range(count):
        for place, (_, prompt, tokens) in enumerate(ranked):
            if len(chosen) == count:
                return chosen
            if used.get(prompt, 0) > most or place in silent or tokens in chosen:
                continue
            if drafter is not None and not _offers(drafter, tokens):
                silent.add(place)
                continue
            chosen.append(tokens)
            used[prompt] = used.get(prompt, 0) + 1
    return chosen


def _offers(drafter: Drafter, tokens: list[int]) -> bool:
    """Whether the drafter offers anything after these tokens; unknown counts as yes."""
    if drafter.capture:
        return True  # it follows the target's hidden states, which are not at hand
    context = DraftContext(
        request_id=_PROBE_ID,
        tokens=tokens,
        prompt_length=len(tokens) - 1,
        params=SamplingParams(temperature=1.0, rule=Rule.REJECTION.value),
        rule=Rule.REJECTION,
        noise=NoiseKey(0),
        round=1,
        budget=4,
        depth=2,
    )
    try:
        (proposal,) = drafter.propose([context])
    except Exception:  # noqa: BLE001 - a drafter is a plug-in; the checks say how it fails
        return True
    finally:
        drafter.release(_PROBE_ID)
    return proposal.tree.num_nodes > 0
