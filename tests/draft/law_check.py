"""What an engine samples against a target's law, which plain forwards give exactly; and faults.

The vocabulary has six tokens, so the law of every continuation of a prompt can be written down.
Two kinds of test: of all continuations together, and of each position given the tokens before it.
The second is weaker for a small uniform fault and sees faults that the first cannot (residual of
another position, closing token from the draft).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

import dspark
from dspark.draft import grow
from dspark.draft.base import Drafter
from dspark.request import SamplingParams
from dspark.rounds import RoundLimits
from dspark.target import Target
from dspark.verify.noise import NoiseKey

VOCAB = 6
PROMPT = (2, 5, 3, 1)
TOKENS = 4  # the first of them comes from prefill, the others from rounds
ALPHA = 1e-4

Array = NDArray[np.float64]
Prefix = tuple[int, ...]
Logits = Callable[[Sequence[Prefix]], Array]
"""Continuations of PROMPT, all of one length n -> logits [continuations, n + 1, V] of the prompt's
last token and of theirs."""

PROCESSORS: dict[str, dict[str, float]] = {
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 2.0},
    "top-k": {"temperature": 0.8, "top_k": 3},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "both": {"temperature": 1.3, "top_k": 5, "top_p": 0.9},
}
RULES: dict[str, dict[str, object]] = {
    "coupled": {"rule": "coupled", "tree_budget": 6, "depth": 3, "width": 2},
    "sample-match": {"rule": "sample-match", "tree_budget": 6, "depth": 3, "width": 2},
    "rejection, chain": {"rule": "rejection", "tree_budget": 3, "depth": 3, "width": 1},
    "rejection, tree": {"rule": "rejection", "tree_budget": 6, "depth": 3, "width": 2},
    "block": {"rule": "block", "tree_budget": 3, "depth": 3, "width": 1},
}


def params_of(rule: str, processors: str, **options: object) -> SamplingParams:
    values = {**RULES[rule], **PROCESSORS[processors], "max_tokens": TOKENS, **options}
    return SamplingParams(ignore_eos=True, **values)


def processed(logits: Array, params: SamplingParams) -> Array:
    """The law that temperature, top-k and top-p make of logits [V], in the plainest way."""
    order = np.argsort(-logits)
    law = np.exp((logits - logits.max()) / params.temperature)
    if params.top_k:
        law[order[params.top_k :]] = 0
    mass = np.cumsum(law[order]) / law.sum()
    law[order[np.append(False, mass[:-1] >= params.top_p)]] = 0
    return law / law.sum()


def laws_of(logits: Logits, params: SamplingParams) -> dict[Prefix, Array]:
    """The law [V] after every continuation of PROMPT that is short enough."""
    texts = list(itertools.product(range(VOCAB), repeat=params.max_tokens - 1))
    laws: dict[Prefix, Array] = {}
    for text, rows in zip(texts, logits(texts), strict=True):
        for size, row in enumerate(rows):
            if text[:size] not in laws:
                laws[text[:size]] = processed(row, params)
    return laws


@dataclass(frozen=True)
class Sampled:
    """Texts, and how many drafted tokens were judged and accepted for them."""

    texts: list[Prefix]
    verified: int
    accepted: int


def sample(
    target: Target, drafter: Drafter, params: SamplingParams, count: int, *, batch: int = 64
) -> Sampled:
    """Draw texts: half of them as samples of one request, half as requests with seeds."""
    engine = dspark.Engine(
        target,
        drafter=drafter,
        config=dspark.EngineConfig(
            max_batch=batch, auto_off=False, limits=RoundLimits(prefill_chunk=1 << 14)
        ),
    )
    texts: list[Prefix] = []
    verified = accepted = 0
    for start in range(0, count, 2 * batch):
        several = replace(params, n=batch, seed=start)
        single = [replace(params, seed=(1 << 40) + start + i) for i in range(batch)]
        for result in engine.generate([list(PROMPT)] * (batch + 1), [several, *single]):
            if result.error is not None:
                raise AssertionError(result.error)
            texts.append(tuple(result.token_ids))
            verified += result.stats.verified
            accepted += result.stats.accepted
    return Sampled(texts, verified, accepted)


def p_values(texts: Sequence[Prefix], laws: Mapping[Prefix, Array]) -> dict[str, float]:
    """Pearson's tests: of whole texts and of their first tokens, and of each position."""
    length = len(texts[0])
    found: dict[str, float] = {}
    for size in range(2, length + 1):
        joint = {
            text: float(np.prod([laws[text[:at]][text[at]] for at in range(size)]))
            for text in itertools.product(range(VOCAB), repeat=size)
        }
        counts = Counter(text[:size] for text in texts)
        found[f"first {size} tokens"] = _tail([_pearson(counts, joint)])
    for at in range(length):
        given: dict[Prefix, Counter[int]] = {}
        for text in texts:
            given.setdefault(text[:at], Counter())[text[at]] += 1
        parts = [_pearson(c, dict(enumerate(laws[before]))) for before, c in given.items()]
        found[f"position {at}"] = _tail(parts)
    return found


def smallest_p(
    target: Target, drafter: Drafter, logits: Logits, params: SamplingParams, count: int
) -> float:
    """The least p-value of `count` texts or a few more; drafts were accepted and rejected."""
    seen = sample(target, drafter, params, count)
    assert len(seen.texts) >= count
    assert 0.1 * count < seen.accepted < 0.9 * seen.verified
    return min(p_values(seen.texts, laws_of(logits, params)).values())


def _pearson(counts: Mapping[object, int], law: Mapping[object, float]) -> tuple[float, int]:
    """Statistic and degrees of freedom; cells that expect less than five share one."""
    total = sum(counts.values())
    if any(law.get(what, 0) == 0 for what in counts):
        return np.inf, 1
    cells: list[list[float]] = []
    rest = [0.0, 0.0]
    for what, mass in law.items():
        pair = [counts.get(what, 0), total * mass]
        if pair[1] >= 5:
            cells.append(pair)
        else:
            rest = [a + b for a, b in zip(rest, pair, strict=True)]
    if rest[1] >= 5:
        cells.append(rest)
    elif cells and rest[1] > 0:
        smallest = min(cells, key=lambda cell: cell[1])
        smallest[:] = [a + b for a, b in zip(smallest, rest, strict=True)]
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    return statistic, max(len(cells) - 1, 0)


def _tail(parts: Sequence[tuple[float, int]]) -> float:
    """The chance of statistics as large as these, together."""
    statistic, dof = (sum(column) for column in zip(*parts, strict=True))
    return float(stats.chi2.sf(statistic, dof)) if dof else 1.0


# -- faults ----------------------------------------------------------------------------------------


def best_drafts(patch: pytest.MonkeyPatch) -> None:
    """The drafter offers its best tokens and records the law it would have drawn from."""
    patch.setattr(
        grow.noise, "draft_topk", lambda shaped, keys, rounds, nodes, m: shaped.topk(m)[::-1]
    )


def law_of_other_tokens(patch: pytest.MonkeyPatch) -> None:
    """The recorded law is laid over the wrong ids, as a wrong draft vocabulary would have it."""
    laws = grow.sampling.laws
    patch.setattr(grow.sampling, "laws", lambda *args: laws(*args).roll(1, 1))


def drafts_share_noise(patch: pytest.MonkeyPatch) -> None:
    """All requests draw their drafts with the noise of one."""
    draw = grow.noise.draft_topk

    def topk(shaped, keys, *args):
        return draw(shaped, [NoiseKey(0)] * len(keys), *args)

    patch.setattr(grow.noise, "draft_topk", topk)
